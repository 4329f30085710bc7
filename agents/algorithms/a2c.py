"""Advantage actor-critic (Mnih et al. 2016, https://arxiv.org/abs/1602.01783), synchronous, over whole episodes."""

from __future__ import annotations

import torch

from agents.algorithms.actor_critic import ActorCritic
from agents.objectives.losses import policy_gradient
from agents.rollouts.episode_buffer import EpisodeSamples


class A2C(ActorCritic):
    """One gradient step per rollout, with advantages from a learned critic.

    With ``gae_lambda=1`` this is REINFORCE with a learned baseline. The arguments are those of ``ActorCritic``.
    """

    def policy_loss(
        self, samples: EpisodeSamples, log_prob: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The policy gradient."""
        return policy_gradient(log_prob, samples.advantages), {}
