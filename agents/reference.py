"""The frozen model that the KL penalty is measured against, and how strongly.

It lives outside every ``nn.Module`` that is trained: nothing to pickle, nothing for an optimiser to find.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from stable_baselines3.common.utils import get_device

from agents.causal_lm import CausalLM
from agents.contexts import packed_positions
from agents.pretrained import freeze_copy_of_adapter, load_causal_lm, load_tokenizer, reference_adapter


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
        :param model: as for ``CausalLMPolicy``. :param n_tokens: V. :param device: where it runs.
        :param dtype: of the weights. :param distribution: ``temperature``, ``min_new_tokens``, ``eos_token_id``,
            ``constraint``.
        """
        if distribution.get("eos_token_id") is None:
            tokenizer = load_tokenizer(model)
            distribution["eos_token_id"] = None if tokenizer is None else tokenizer.eos_token_id
        lm = CausalLM(load_causal_lm(model, dtype), n_tokens, **distribution)
        return cls(lm.requires_grad_(False).to(get_device(device)))

    @torch.no_grad()
    def log_probs(self, observations: Mapping[str, torch.Tensor], actions: torch.Tensor) -> torch.Tensor:
        """
        :param observations: a packed batch (see ``EpisodeSamples``). :param actions: int64 [N].
        :return: log π_ref of each action [N], float32.
        """
        device = self.lm.device
        packed = {name: x.to(device) for name, x in observations.items()}
        with reference_adapter(self.lm) if self.shares_base else contextlib.nullcontext():
            return self.lm.evaluate(packed["input_ids"], packed_positions(packed), actions.to(device))[0]


class KLController(Protocol):
    """Decides β after every rollout."""

    coef: float

    def update(self, kl: float) -> None:
        """
        :param kl: mean KL to the reference per episode (nats).
        """


class FixedKL:
    """β stays what it is.

    :param coef: β.
    """

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float) -> None:
        """Nothing to do."""


class AdaptiveKL:
    """β follows a target KL by proportional control of its logarithm.

    e = clip(KL / target − 1, −0.2, 0.2) and β ← β (1 + K e): Ziegler et al. 2019, https://arxiv.org/abs/1909.08593,
    section 2.2, with K = 0.1 there.

    :param coef: β at the start. :param target: KL per episode to hold (nats).
    :param gain: K. The paper's trainings have hundreds of rollouts, ours have tens, so it is higher here: β moves by at
        most 10 % a rollout.
    """

    def __init__(self, coef: float, target: float, gain: float = 0.5) -> None:
        if target <= 0:
            raise ValueError(f"Expected a target KL > 0 nats per episode, got {target}.")
        if coef <= 0:
            raise ValueError(f"Expected a kl_coef > 0 to start from, got {coef}: β is multiplied, and 0 would stay 0.")
        self.coef = coef
        self._target = target
        self._gain = gain

    def update(self, kl: float) -> None:
        error = min(max(kl / self._target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + self._gain * error
