"""Advantage actor-critic (Mnih et al. 2016, https://arxiv.org/abs/1602.01783), synchronous, over whole episodes."""

from __future__ import annotations

from typing import Any

import torch

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.objectives.losses import policy_gradient, value_loss
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples


class A2C(OnPolicyAlgorithm):
    """One gradient step per rollout, with advantages from a learned critic.

    Generalized advantage estimation replaces a part of the return, which λ decides, by the critic's value of the next
    context.

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param gae_lambda: λ of generalized advantage estimation. With 1 nothing is replaced, and this is REINFORCE with a
        learned baseline.
    :param vf_coef: the weight of the value loss.
    :param ent_coef: the weight of an entropy bonus.
    :param kwargs: the other arguments of ``OnPolicyAlgorithm``.
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
        """Advantages and returns by generalized advantage estimation."""
        buffer.estimate_gae(self.gamma, self.gae_lambda)

    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The policy gradient, the weighted value loss, and minus the weighted entropy."""
        policy_loss = policy_gradient(log_prob, samples.advantages)
        critic_loss = value_loss(values, samples.old_values, samples.returns, clip_range=None)
        loss = policy_loss + self.vf_coef * critic_loss
        if self.ent_coef:  # the gradient of the entropy is expensive, and not needed with a weight of 0
            loss = loss - self.ent_coef * entropy
        return loss, {"policy_gradient_loss": policy_loss, "value_loss": critic_loss, "entropy_loss": -entropy}
