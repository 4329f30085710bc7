"""Proximal policy optimisation (Schulman et al. 2017, https://arxiv.org/abs/1707.06347), as language models use it.

``docs/ppo.md`` walks through it line by line.
"""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.type_aliases import Schedule

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.objectives.kl import kl_k3
from agents.objectives.losses import clipped_surrogate, value_loss
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples


class PPO(OnPolicyAlgorithm):
    """
    :param policy: see ``OnPolicyAlgorithm``, like every argument that isn't named here.
    :param env: likewise.
    :param learning_rate: lower than that of the algorithms that take one step a rollout.
    :param n_episodes: episodes of a rollout.
    :param batch_size: episodes of a minibatch.
    :param n_epochs: passes over a rollout.
    :param normalize_advantage: whiten advantages over the whole rollout.
    :param gae_lambda: λ of generalized advantage estimation.
    :param clip_range: ε of the clipped surrogate.
    :param clip_range_vf: ε of value clipping, None for none.
    :param vf_coef: weight of the value loss.
    :param ent_coef: weight of an entropy bonus.
    :param target_kl: stop an update when the KL to the policy that sampled exceeds 1.5 times this (per token).
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        learning_rate: float | Schedule = 1e-4,
        n_episodes: int = 64,
        batch_size: int | None = 16,
        n_epochs: int = 4,
        gae_lambda: float = 0.95,
        clip_range: float = 0.2,
        clip_range_vf: float | None = 0.2,
        vf_coef: float = 0.1,
        ent_coef: float = 0.0,
        target_kl: float | None = None,
        normalize_advantage: bool = True,
        **kwargs: Any,
    ) -> None:
        self.gae_lambda = gae_lambda
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.vf_coef = vf_coef
        self.ent_coef = ent_coef
        self.target_kl = target_kl
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_episodes=n_episodes,
            batch_size=batch_size,
            n_epochs=n_epochs,
            normalize_advantage=normalize_advantage,
            **kwargs,
        )

    def estimate(self, buffer: EpisodeBuffer) -> None:
        buffer.estimate_gae(self.gamma, self.gae_lambda)

    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy_loss = clipped_surrogate(log_prob, samples.old_log_prob, samples.advantages, self.clip_range)
        critic_loss = value_loss(values, samples.old_values, samples.returns, self.clip_range_vf)
        loss = policy_loss + self.vf_coef * critic_loss
        if self.ent_coef:  # otherwise its gradient would be computed, to be multiplied by 0
            loss = loss - self.ent_coef * entropy
        log_ratio = (log_prob - samples.old_log_prob).detach()
        return loss, {
            "policy_gradient_loss": policy_loss,
            "value_loss": critic_loss,
            "entropy_loss": -entropy,
            "approx_kl": kl_k3(-log_ratio),  # KL(π_old ‖ π), from samples of π_old
            "clip_fraction": ((log_ratio.exp() - 1).abs() > self.clip_range).float(),
        }

    def stop_early(self, means: dict[str, float]) -> bool:
        return self.target_kl is not None and means["approx_kl"] > 1.5 * self.target_kl
