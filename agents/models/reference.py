"""The frozen model that the KL penalty is measured against, and how strongly.

It lives outside every ``nn.Module`` that is trained: nothing to pickle, nothing for an optimiser to find.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from stable_baselines3.common.utils import get_device

from agents.models.causal_lm import CausalLM
from agents.models.contexts import packed_positions
from agents.models.pretrained import freeze_copy_of_adapter, load_causal_lm, reference_adapter, tokenizer_beside


class Reference:
    """Log-probabilities under the frozen model, of the same distribution as the policy's (temperature, masks).

    :param lm: the frozen model.
    :param shares_base: ``lm`` is the policy's own model, and the reference is it without its LoRA adapter, or with the
        adapter that it started from.
    """

    def __init__(self, lm: CausalLM, shares_base: bool = False) -> None:
        self.lm = lm
        self.shares_base = shares_base

    @classmethod
    def of(cls, policy: Any) -> Reference:
        """The policy as it is now: a frozen copy, or with LoRA the base model that both share (no second copy).

        :param policy: a ``CausalLMPolicy``.
        """
        if policy.lm.peft_model is not None:
            if policy.constructor_arguments["lora"] is None:  # it goes on from an adapter, which is no longer zero
                freeze_copy_of_adapter(policy.lm.peft_model)
                policy.clear_cache()
            return cls(policy.lm, shares_base=True)
        # A constraint is a function, the same for both; it may hold a model of its own.
        shared = {id(policy.lm.constraint): policy.lm.constraint}
        return cls(copy.deepcopy(policy.lm, shared).requires_grad_(False))

    @classmethod
    def load(
        cls,
        model: Any,
        n_tokens: int,
        device: torch.device | str = "auto",
        dtype: str = "float32",
        **distribution: Any,
    ) -> Reference:
        """
        :param model: as for ``CausalLMPolicy``.
        :param n_tokens: V.
        :param device: where it runs.
        :param dtype: of the weights.
        :param distribution: ``temperature``, ``min_new_tokens``, ``eos_token_id``,
            ``constraint``.
        """
        if distribution.get("eos_token_id") is None:
            tokenizer = tokenizer_beside(model)
            distribution["eos_token_id"] = None if tokenizer is None else tokenizer.eos_token_id
        lm = CausalLM(load_causal_lm(model, dtype), n_tokens, **distribution)
        return cls(lm.requires_grad_(False).to(get_device(device)))

    @torch.no_grad()
    def log_probs(self, observations: Mapping[str, torch.Tensor], actions: torch.Tensor) -> torch.Tensor:
        """
        :param observations: a packed batch (see ``EpisodeSamples``).
        :param actions: int64 [N].
        :return: log π_ref of each action [N], float32.
        """
        device = self.lm.device
        packed = {name: x.to(device) for name, x in observations.items()}
        with reference_adapter(self.lm) if self.shares_base else contextlib.nullcontext():
            return self.lm.evaluate(packed["input_ids"], packed_positions(packed), actions.to(device))[0]
