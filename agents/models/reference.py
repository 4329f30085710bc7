"""The frozen model that the KL penalty refers to.

It is kept outside of every ``nn.Module`` that is trained, so that neither SB3's saving nor an optimiser sees it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from stable_baselines3.common.utils import get_device
from transformers import PreTrainedTokenizerBase

from agents.models.adapter import unwrapped
from agents.models.causal_lm import CausalLM, OtherLogits, Positions, Scores
from agents.models.contexts import packed_positions
from agents.models.distribution import TokenDistribution
from agents.models.finite import check_scores
from agents.models.pretrained import check_positions, load_frozen, model_ends, tokenizer_beside
from text_env.ends_of_text import as_ids


class Reference:
    """Log-probabilities under a frozen model, of the same distribution as the policy's, temperature and masks included.

    :param lm: the frozen model.
    :param shares_base: whether ``lm`` is the policy's own model. The reference is then that model as it was before its
        adapter was trained.
    :param tokenizer: the frozen model's tokenizer; None if it is not known.
    """

    def __init__(
        self, lm: CausalLM, shares_base: bool = False, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.lm = lm
        self.shares_base = shares_base
        self.tokenizer = tokenizer

    @classmethod
    def of(cls, policy: Any) -> Reference:
        """The policy as it is now, frozen.

        Without an adapter this is a copy. With one it is the policy's own model, which both share, with the adapter
        switched off or, if training goes on from an existing adapter, with a frozen copy of that adapter.

        :param policy: a ``CausalLMPolicy``.
        :return: the reference.
        """
        if policy.lm.adapter is not None:
            if policy.constructor_arguments["lora"] is None:  # training goes on from an adapter, which is not zero
                policy.lm.adapter.remember()
                policy.clear_cache()
            return cls(policy.lm, shares_base=True, tokenizer=policy.tokenizer)
        # The description is shared and not copied, since its constraint may hold a model.
        shared = {id(policy.lm.distribution): policy.lm.distribution}
        return cls(copy.deepcopy(policy.lm, shared).requires_grad_(False), tokenizer=policy.tokenizer)

    @classmethod
    def load(
        cls,
        model: Any,
        n_tokens: int,
        device: torch.device | str = "auto",
        dtype: str = "float32",
        eos_token_id: int | Sequence[int] | None = None,
        **distribution: Any,
    ) -> Reference:
        """Load a frozen model.

        :param model: the model, as for :func:`agents.models.pretrained.load_causal_lm`; a live one is copied.
        :param n_tokens: V, the number of tokens of the environment.
        :param device: the device that the model runs on.
        :param dtype: the floating-point type of the weights.
        :param eos_token_id: the token that ends a text, or several of which each does; None: those of the model's
            generation config and of the tokenizer that is saved with it.
        :param distribution: ``temperature``, ``min_new_tokens``, ``constraint`` and ``autocast`` of
            :class:`agents.models.distribution.TokenDistribution`, which must be those of the policy.
        :return: the reference.
        :raises ValueError: if there is no such model, or if it has fewer than V logits.
        """
        tokenizer = tokenizer_beside(model)
        loaded = load_frozen(model, dtype)
        ends = as_ids(eos_token_id) or model_ends(unwrapped(loaded), tokenizer, n_tokens)
        lm = CausalLM(loaded, TokenDistribution(n_tokens, eos_token_ids=ends, **distribution))
        return cls(lm.requires_grad_(False).to(get_device(device)), tokenizer=tokenizer)

    @property
    def distribution(self) -> TokenDistribution:
        """The distribution of the log-probabilities."""
        return self.lm.distribution

    def log_probs(self, observations: Mapping[str, torch.Tensor], actions: torch.Tensor) -> torch.Tensor:
        """
        :param observations: the observations of a packed batch (see ``EpisodeSamples``).
        :param actions: int64 [N], token ids.
        :return: log π_ref of each action, float32 [N].
        :raises ValueError: if the frozen model has too few positions for the batch.
        :raises FloatingPointError: if the frozen model is on a CPU and a log-probability is NaN. On another device NaN
            is found by whoever copies them, as ``EpisodeBuffer`` does.
        """
        log_prob = self.scores(observations, actions).log_prob
        if log_prob.device.type == "cpu":
            check_scores(log_prob, None, observations["input_ids"], packed_positions(observations), self.lm)
        return log_prob

    @torch.no_grad()
    def scores(self, observations: Mapping[str, torch.Tensor], actions: torch.Tensor) -> Scores:
        """
        :param observations: the observations of a packed batch (see ``EpisodeSamples``).
        :param actions: int64 [N], token ids.
        :return: what the frozen model says of the actions, which nobody has looked at yet. Its hidden states are all
            that :meth:`logits_at` needs.
        :raises ValueError: if the frozen model has too few positions for the batch.
        """
        device = self.lm.device
        input_ids = observations["input_ids"].to(device)
        at = Positions(*(x.to(device) for x in packed_positions(observations)))
        check_positions(self.lm.model, input_ids.shape[1])  # the policy's model may have more than this one
        with self._frozen():
            return self.lm.evaluate(input_ids, at, actions.to(device))

    def logits_at(self, hidden: torch.Tensor) -> OtherLogits:
        """The frozen model's whole distributions, which are too large to be kept and are made anew of hidden states.

        :param hidden: the frozen model's last hidden states, [N, H], of :meth:`scores`.
        :return: a function of a slice of the N positions, their ``step`` and what is ``allowed`` there, which returns
            the logits [n, V] without a gradient, on the device of ``step``.
        """
        device = self.lm.device

        @torch.no_grad()
        def logits(part: slice, step: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
            mask = None if allowed is None else allowed.to(device)
            with self._frozen():  # the head may have an adapter, too
                return self.lm.logits(hidden[part], step.to(device), mask).to(step.device)

        return logits

    def _frozen(self) -> contextlib.AbstractContextManager[None]:
        """A context manager in which a model that is shared with the policy is what it was before training."""
        if not self.shares_base:
            return contextlib.nullcontext()
        assert self.lm.adapter is not None
        return self.lm.adapter.as_remembered()
