"""The same policy for sb3-contrib's ``MaskablePPO``, which asks the environment for its masks and hands them on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from agents.policies.causal_lm_policy import CausalLMActorCritic


class MaskableCausalLMPolicy(CausalLMActorCritic, MaskableActorCriticPolicy):
    """``CausalLMPolicy`` in the shape that ``MaskablePPO`` wants; the parameters are the same.

    What the environment's ``action_masks()`` forbid has probability 0, and so has what the policy's own ``constraint``
    forbids. With ``TextRLHF-v0`` the environment's is enough: ``MaskablePPO(MaskableCausalLMPolicy,
    make_vec_env("TextRLHF-v0", n_envs=16, env_kwargs={"constraint": …}))``. Its rollout buffer keeps a mask of V
    float32 for every token, 4 V bytes.

    :raises ValueError: if it is given to an algorithm without masks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "use_sde" in kwargs:  # what SB3's on-policy algorithms say to every policy, and MaskablePPO doesn't
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
