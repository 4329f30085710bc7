"""Proximal policy optimisation (Schulman et al. 2017, https://arxiv.org/abs/1707.06347), as it is used for language
models.

``docs/ppo.md`` explains it line by line.
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
    """Several epochs of minibatches per rollout, with the clipped surrogate and a learned critic.

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param learning_rate: the learning rate. The default is lower than that of the algorithms that take one step per
        rollout.
    :param n_episodes: the number of episodes of a rollout.
    :param batch_size: the number of episodes of a minibatch; None: all of the rollout.
    :param n_epochs: the number of passes over a rollout.
    :param gae_lambda: λ of generalized advantage estimation.
    :param clip_range: ε of the clipped surrogate.
    :param clip_range_vf: ε of value clipping; None: no value clipping.
    :param vf_coef: the weight of the value loss.
    :param ent_coef: the weight of an entropy bonus.
    :param target_kl: an update stops when the KL divergence from the policy that sampled, in nats per token, exceeds
        1.5 times this number; None: never.
    :param normalize_advantage: whether to shift and scale advantages to mean 0 and variance 1 over the whole rollout.
    :param kwargs: the other arguments of ``OnPolicyAlgorithm``.
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
        """Advantages and returns by generalized advantage estimation."""
        buffer.estimate_gae(self.gamma, self.gae_lambda)

    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The clipped surrogate, the weighted value loss, and minus the weighted entropy."""
        policy_loss = clipped_surrogate(log_prob, samples.old_log_prob, samples.advantages, self.clip_range)
        critic_loss = value_loss(values, samples.old_values, samples.returns, self.clip_range_vf)
        loss = policy_loss + self.vf_coef * critic_loss
        if self.ent_coef:  # the gradient of the entropy is expensive, and not needed with a weight of 0
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
        """Whether the KL divergence from the policy that sampled exceeds 1.5 times ``target_kl``."""
        return self.target_kl is not None and means["approx_kl"] > 1.5 * self.target_kl
