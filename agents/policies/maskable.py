"""The policy for sb3-contrib's ``MaskablePPO``, which asks the environment for masks and passes them to the policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from agents.policies.causal_lm_policy import CausalLMActorCritic


class MaskableCausalLMPolicy(CausalLMActorCritic, MaskableActorCriticPolicy):
    """``CausalLMPolicy`` with the interface that ``MaskablePPO`` expects. The parameters are the same.

    Tokens that the environment's ``action_masks()`` or the policy's own ``constraint`` forbid have probability 0. With
    ``TextRLHF-v0`` the environment's constraint is enough: ``MaskablePPO(MaskableCausalLMPolicy,
    make_vec_env("TextRLHF-v0", n_envs=16, env_kwargs={"constraint": …}))``. The rollout buffer of ``MaskablePPO``
    stores a mask of V float32 numbers for every token, which is 4 V bytes.

    :param args: the positional arguments of ``CausalLMPolicy``.
    :param kwargs: the keyword arguments of ``CausalLMPolicy``.
    :raises ValueError: if it is passed to an algorithm without masks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "use_sde" in kwargs:  # SB3's on-policy algorithms pass it to every policy, and MaskablePPO does not
            raise ValueError(
                "MaskableCausalLMPolicy is for sb3_contrib.MaskablePPO. This algorithm asks the environment for no "
                "masks: expected CausalLMPolicy, which applies policy_kwargs={'constraint': ...} itself."
            )
        super().__init__(*args, **kwargs)

    def get_distribution(
        self, obs: PyTorchObs, action_masks: np.ndarray | torch.Tensor | None = None
    ) -> MaskableCategoricalDistribution:
        """
        :param obs: a batch of B observations.
        :param action_masks: [B, V], true where a token is allowed.
        :return: sb3-contrib's categorical distribution over the V tokens.
        """
        logits = self._finite_logits(obs, action_masks)
        return MaskableCategoricalDistribution(self.distribution.n_tokens).proba_distribution(logits)
