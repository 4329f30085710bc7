"""Advantage actor-critic (Mnih et al. 2016, https://arxiv.org/abs/1602.01783), synchronous, over whole episodes."""

from __future__ import annotations

from typing import Any

import torch

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.objectives.losses import policy_gradient, value_loss
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples


class A2C(OnPolicyAlgorithm):
    """One gradient step a rollout; the critic's value of the next context stands in for the rest of the episode.

    :param policy: see ``OnPolicyAlgorithm``, like every argument that isn't named here.
    :param env: likewise.
    :param gae_lambda: λ of generalized advantage estimation; at 1 nothing is bootstrapped, and this is REINFORCE with a
        learned baseline.
    :param vf_coef: weight of the value loss.
    :param ent_coef: weight of an entropy bonus.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        gae_lambda: float = 0.95,
        vf_coef: float = 0.1,
        ent_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.gae_lambda = gae_lambda
        self.vf_coef = vf_coef
        self.ent_coef = ent_coef
        super().__init__(policy, env, **kwargs)

    def estimate(self, buffer: EpisodeBuffer) -> None:
        buffer.estimate_gae(self.gamma, self.gae_lambda)

    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy_loss = policy_gradient(log_prob, samples.advantages)
        critic_loss = value_loss(values, samples.old_values, samples.returns, clip_range=None)
        loss = policy_loss + self.vf_coef * critic_loss
        if self.ent_coef:  # otherwise its gradient would be computed, to be multiplied by 0
            loss = loss - self.ent_coef * entropy
        return loss, {"policy_gradient_loss": policy_loss, "value_loss": critic_loss, "entropy_loss": -entropy}
