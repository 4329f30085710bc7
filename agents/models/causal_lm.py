"""A Hugging Face causal language model as a scorer of token contexts.

This is the only component that runs a language model for the policy. The policy adds a value head to it, and the frozen
reference of the KL penalty is another instance of it. So what is sampled, what is trained and what is compared are the
same distribution, temperature and masks included.

Notation: B sequences, T columns, N scored positions, H hidden units, V tokens of the environment.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from agents.models.adapter import Adapter, unwrapped
from agents.models.attention import without_cudnn_attention
from agents.models.distribution import LogProbAndEntropy, TokenDistribution
from agents.models.head import decoder_of, find_logit_map
from agents.models.recompute import check_recomputable, layers_to_recompute, recomputed
from agents.models.sizes import chunk_positions
from agents.objectives.kl import kl_exact
from text_env.constraints import Constraint, Contexts, all_of, allowed_tokens


class Positions(NamedTuple):
    """The positions in a batch of sequences at which the distribution of the next token is asked for.

    :param row: int64 [N], the index of the sequence.
    :param column: int64 [N], the index of the last token of the context.
    :param step: int64 [N], how many tokens of the context belong to the response.
    """

    row: torch.Tensor
    column: torch.Tensor
    step: torch.Tensor


class Scores(NamedTuple):
    """What a model says of N actions.

    :param log_prob: the log-probability of each action, [N], nats.
    :param entropy: the entropy of its distribution, [N], nats.
    :param kl: the KL divergence of that distribution from another model's, [N], nats; None if there is no other model.
    :param hidden: the last hidden state of its context, [N, H].
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor | None
    hidden: torch.Tensor


OtherLogits = Callable[[slice, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Another model's :meth:`CausalLM.logits`, of a slice of N positions, with their ``step`` and ``allowed``."""


class CausalLM(nn.Module):
    """Next-token distributions of a causal language model, restricted to the environment's tokens.

    Dropout is always off.

    :param model: the Hugging Face model, or PEFT's wrapper around it.
    :param distribution: the distribution that is sampled and scored. The model may have more logits than its V tokens,
        as models with padded embeddings have; the first V are used.
    :param compile_forward: whether to run whole sequences through ``torch.compile``, which needs a C++ compiler on
        CPUs.
    :param gradient_checkpointing: whether to compute the layers of whole sequences once more in the backward pass,
        which takes less memory and gives the same gradient. If False, this is done where the model was told so by
        ``gradient_checkpointing_enable()``.
    :raises ValueError: if the model is no decoder with a head, if it has fewer than V logits, if its logits are not a
        function of the last hidden state, if it depends on more than a context, or if it can't be checkpointed.
    :raises FloatingPointError: if the logits of the model are not numbers.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        distribution: TokenDistribution,
        compile_forward: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.adapter = Adapter(model) if isinstance(model, PeftModel) else None
        model = unwrapped(model)
        head = model.get_output_embeddings()
        if head is None or model.config.is_encoder_decoder:
            raise ValueError(f"Expected a causal language model (a decoder with a head), got {type(model).__name__}.")
        n_logits, self.hidden_size = head.weight.shape
        n_tokens = distribution.n_tokens
        if n_logits < n_tokens:
            raise ValueError(
                f"Expected a model with at least {n_tokens} logits, one for each token of the environment; "
                f"{type(model).__name__} has {n_logits}. Use the model's own tokenizer in the environment, "
                f"or model.resize_token_embeddings({n_tokens})."
            )
        fuse_activations(model)
        self.model = model.eval()
        self.distribution = distribution
        self.compile_forward = compile_forward
        self.gradient_checkpointing = gradient_checkpointing
        check_recomputable(model, self.backbone, gradient_checkpointing, compile_forward)
        # The head is applied apart from the model, only where it is needed.
        self._logit_map = find_logit_map(model, n_tokens)
        self._check_causality()

    def save_pretrained(self, directory: Path) -> None:
        """Write a directory that transformers loads without this package: the model, or the adapter that was trained.

        :param directory: an existing directory.
        """
        if self.adapter is None:
            self.model.save_pretrained(directory)
        else:
            self.adapter.save_pretrained(directory)
        self._write_ends(directory)

    def _write_ends(self, directory: Path) -> None:
        """Texts of the saved model end where this one's do, whatever its own generation config says. An adapter's
        directory has no such file yet.
        """
        if ends := list(self.distribution.eos_token_ids):
            path = directory / "generation_config.json"
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            content.pop("_from_model_config", None)  # transformers would make it anew from config.json
            content["eos_token_id"] = ends if len(ends) > 1 else ends[0]
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @property
    def backbone(self) -> nn.Module:
        """The decoder below the language-model head: token ids in, last hidden states out."""
        return decoder_of(self.model)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> CausalLM:
        """Leave dropout off: with it, the policy that is trained would not be the one that was sampled from.

        :param mode: not used.
        :return: this module.
        """
        return super().train(False)

    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states of right-padded sequences, by one forward pass without cache.

        No attention mask is needed, since causal attention never looks at what stands to the right.

        :param input_ids: int64 [B, T], right-padded with any tokens.
        :return: [B, T, H].
        """
        return self.run(self.backbone, input_ids)

    def run(self, backbone: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """Call :func:`full_forward` under this model's autocast, compiled or checkpointed as the arguments say.

        :param backbone: the decoder to run: this model's, or that of a separate critic.
        :param input_ids: int64 [B, T], right-padded.
        :return: last hidden states, [B, T, H].
        """
        forward = _compiled_forward() if self.compile_forward else full_forward
        layers = layers_to_recompute(backbone, self.gradient_checkpointing) if torch.is_grad_enabled() else []
        with self.precision(), recomputed(layers):
            return forward(backbone, input_ids)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Within it, the model runs under the autocast and with the kernels that it has in the rollout, in the update
        and as a reference.
        """
        device, name = self.device, self.distribution.autocast
        autocast = torch.autocast(device.type, getattr(torch, name)) if name else contextlib.nullcontext()
        with autocast, without_cudnn_attention(device):
            yield

    def allowed(self, contexts: Contexts, action_masks: np.ndarray | torch.Tensor | None = None) -> torch.Tensor | None:
        """The tokens that may follow each context.

        :param contexts: N contexts.
        :param action_masks: further masks of N × V values, true where a token is allowed.
        :return: bool [N, V], true where a token is allowed; None if :meth:`logits` needs no mask.
        :raises ValueError: if no token is allowed after some context.
        """
        if action_masks is None and not self.distribution.needs_masks:
            return None
        constraint, n_tokens = self.distribution.all_constraints, self.distribution.n_tokens
        if action_masks is not None:
            given = action_masks.cpu().numpy() if isinstance(action_masks, torch.Tensor) else np.asarray(action_masks)
            constraint = all_of(constraint, action_masks_given(given.astype(np.bool_).reshape(-1, n_tokens)))
        assert constraint is not None
        return torch.from_numpy(allowed_tokens(constraint, contexts, n_tokens)).to(self.device)

    def logits(
        self, hidden: torch.Tensor, step: torch.Tensor | None, allowed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The logits that tokens are sampled from, with the temperature applied and forbidden tokens at minus infinity.

        :param hidden: last hidden states, [N, H].
        :param step: int64 [N], how many tokens of each context belong to the response; None: no fewer than
            ``min_new_tokens``.
        :param allowed: bool [N, V], what :meth:`allowed` returned for these contexts.
        :return: [N, V], float64 for models in float64, else float32.
        """
        with self.precision():
            logits = self._head(hidden)[:, : self.distribution.n_tokens]
        return self.distribution.logits(logits.to(torch.promote_types(logits.dtype, torch.float32)), step, allowed)

    def log_prob_and_entropy(
        self,
        hidden: torch.Tensor,
        step: torch.Tensor,
        actions: torch.Tensor,
        allowed: Callable[[slice], torch.Tensor | None] = lambda part: None,
        other: OtherLogits | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The log-probability of each action and the entropy of its distribution, in chunks of positions; if asked for,
        the KL divergence of the distribution from another model's, too.

        The backward pass computes the logits of each chunk again, so that they never exist for all positions at once.
        If all positions fit into one chunk, its logits are kept.

        :param hidden: last hidden states, [N, H].
        :param step: int64 [N], how many tokens of each context belong to the response.
        :param actions: int64 [N], token ids.
        :param allowed: a function that takes a slice of the N positions and returns what :meth:`allowed` returns for
            them.
        :param other: the logits of a frozen model of the same distribution; None: no divergence is asked for.
        :return: log-probabilities [N], entropies [N] and, with ``other``, KL divergences [N], in nats, of the dtype of
            :meth:`logits`.
        """

        def chunk(
            part: slice, hidden: torch.Tensor, step: torch.Tensor, actions: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            mask = allowed(part)
            logits = self.logits(hidden, step, mask)
            scores: tuple[torch.Tensor, ...] = LogProbAndEntropy.apply(logits, actions)
            if other is None:
                return scores
            return *scores, kl_exact(logits.log_softmax(dim=-1), other(part, step, mask).log_softmax(dim=-1))

        size = chunk_positions(hidden.device, self.distribution.n_tokens)
        if len(actions) <= size:
            return chunk(slice(0, size), hidden, step, actions)
        slices = [slice(start, start + size) for start in range(0, len(actions), size)]
        parts = zip(slices, hidden.split(size), step.split(size), actions.split(size), strict=True)
        if torch.is_grad_enabled():
            done = [checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        else:
            done = [chunk(*part) for part in parts]
        return tuple(torch.cat(column) for column in zip(*done, strict=True))

    def evaluate(
        self,
        input_ids: torch.Tensor,
        at: Positions,
        actions: torch.Tensor,
        action_masks: torch.Tensor | None = None,
        other: OtherLogits | None = None,
    ) -> Scores:
        """Score actions inside whole sequences, by one forward pass over the sequences.

        :param input_ids: int64 [B, T], right-padded.
        :param at: the N positions after which the actions follow.
        :param actions: int64 [N], token ids.
        :param action_masks: further masks, [N, V], true where a token is allowed.
        :param other: the logits of a frozen model of the same distribution, which this one is compared with.
        :return: what this model says of the actions. Whoever reads it finds out whether it is NaN, since to look would
            be to wait for the device.
        """
        hidden = self.hidden_states(input_ids)[at.row, at.column]
        log_prob, entropy, *kl = self._score(hidden, input_ids, at, actions, action_masks, other)
        return Scores(log_prob, entropy, kl[0] if kl else None, hidden)

    def _score(
        self,
        hidden: torch.Tensor,
        input_ids: torch.Tensor,
        at: Positions,
        actions: torch.Tensor,
        action_masks: torch.Tensor | None,
        other: OtherLogits | None,
    ) -> tuple[torch.Tensor, ...]:
        if action_masks is None and not self.distribution.needs_masks:
            return self.log_prob_and_entropy(hidden, at.step, actions, other=other)
        ids, row, column, step = (x.cpu().numpy() for x in (input_ids, *at))

        def allowed(part: slice) -> torch.Tensor | None:
            contexts = Contexts(ids[row[part]], column[part] + 1, step[part])
            return self.allowed(contexts, None if action_masks is None else action_masks[part])

        return self.log_prob_and_entropy(hidden, at.step, actions, allowed, other)

    @torch.no_grad()
    def _check_causality(self) -> None:
        """Sequences are padded on the right, and contexts of one text are read all at once: prove that a context's
        answer depends neither on what follows it nor on its neighbours.
        """
        tokens = (torch.arange(24, device=self.device) * 7 + 1).reshape(3, 8) % self.distribution.n_tokens
        alone, together = full_forward(self.backbone, tokens[:1, :4]), full_forward(self.backbone, tokens)[:1, :4]
        tolerance = 1e-3 if alone.dtype.itemsize > 2 else 0.1
        error = float((alone - together).abs().max() / alone.abs().max().clamp(min=1e-6))
        if error > tolerance:
            raise ValueError(
                f"Expected a causal language model, whose answer to a context depends on nothing else; what "
                f"{type(self.model).__name__} says of four tokens changes by {error:.0e} of itself when others follow "
                "them or stand in the same batch. It can't be trained here: take a decoder with causal attention."
            )

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logit_map(self.model.get_output_embeddings(), hidden)


def action_masks_given(masks: np.ndarray) -> Constraint:
    """
    :param masks: bool [B, V], true where a token is allowed.
    :return: the masks as a constraint, which may be called with the B contexts of the masks only.
    """

    def action_masks(contexts: Contexts, n_tokens: int) -> np.ndarray:
        return masks

    return action_masks


def full_forward(backbone: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """One forward pass over whole sequences, without cache.

    :param backbone: a Hugging Face decoder without a head.
    :param input_ids: int64 [B, T], right-padded.
    :return: last hidden states, [B, T, H].
    """
    hidden: torch.Tensor = backbone(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


@functools.cache
def _compiled_forward() -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    # One compiled function serves all models and lengths, since PyTorch specialises it for each model.
    return torch.compile(full_forward, dynamic=True)


def fuse_activations(model: nn.Module) -> None:
    """Replace GPT-2's tanh approximation of GELU, which takes eight operations, by PyTorch's kernel for it.

    :param model: the model, which is changed in place.
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))
