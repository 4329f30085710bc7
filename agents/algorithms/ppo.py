"""Proximal policy optimisation (Schulman et al. 2017, https://arxiv.org/abs/1707.06347), as it is used for language
models.

``docs/ppo.md`` explains it line by line.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from stable_baselines3.common.type_aliases import Schedule

from agents.algorithms.actor_critic import ActorCritic
from agents.algorithms.clipping import beyond, clipped_loss
from agents.algorithms.trust_region import TrustRegion
from agents.rollouts.episode_buffer import EpisodeSamples


class PPO(ActorCritic):
    """Several minibatches per rollout, with the clipped surrogate and a learned critic.

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param learning_rate: the learning rate. The default is lower than that of the algorithms that take one step per
        rollout.
    :param n_episodes: the number of episodes of a rollout.
    :param batch_size: the number of episodes of a minibatch; None: all of the rollout.
    :param n_epochs: the number of passes over a rollout.
    :param clip_range: ε of the clipped surrogate.
    :param clip_range_vf: ε of value clipping; None: no value clipping.
    :param target_kl: an update stops when the KL divergence from the policy that sampled, in nats per token, exceeds
        1.5 times this number; None: never.
    :param trust_region: the largest KL divergence from the policy that sampled, in nats per *episode*, that an update
        may reach. A longer update is shortened, and the learning rate of the next ones is lowered as long as they would
        be too long; None: no limit.
    :param normalize_advantage: whether to shift and scale advantages to mean 0 and variance 1 over the whole rollout.
    :param kwargs: the other arguments of ``ActorCritic`` and ``OnPolicyAlgorithm``.
    """

    state_attributes: ClassVar[tuple[str, ...]] = (*ActorCritic.state_attributes, "step_factor")

    def __init__(
        self,
        policy: Any,
        env: Any,
        learning_rate: float | Schedule = 1e-4,
        n_episodes: int = 64,
        batch_size: int | None = 16,
        n_epochs: int = 4,
        clip_range: float = 0.2,
        clip_range_vf: float | None = 0.2,
        target_kl: float | None = None,
        trust_region: float | None = None,
        normalize_advantage: bool = True,
        **kwargs: Any,
    ) -> None:
        if trust_region is not None and not trust_region > 0:
            raise ValueError(f"Expected a trust_region > 0 nats per episode, or None, got {trust_region}.")
        self.clip_range = clip_range
        self.target_kl = target_kl
        self.trust_region = trust_region
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_episodes=n_episodes,
            batch_size=batch_size,
            n_epochs=n_epochs,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            **kwargs,
        )

    def policy_loss(
        self, samples: EpisodeSamples, log_prob: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The clipped surrogate."""
        return clipped_loss(samples, log_prob, self.clip_range)

    def stop_early(self, means: dict[str, float]) -> bool:
        """Whether the KL divergence from the policy that sampled exceeds 1.5 times ``target_kl``."""
        return beyond(self.target_kl, means)

    def update_policy(self) -> None:
        """Update policy and critic, within the trust region."""
        if self.trust_region is None:
            super().update_policy()
            return
        region = TrustRegion(self.policy, self.trust_region, self.engine, self.micro_batch_tokens)
        super().update_policy()
        reached, kept = region.hold(self.buffer)
        # Towards the rate at which this update would have ended at the limit. Of an update that went very far that is
        # badly known, hence the lower bound, and the way back up is taken more slowly.
        self.step_factor = min(1.0, self.step_factor * (max(kept, 0.5) if kept < 1 else 1.2))
        self.logger.record("train/update_kl", reached)
        self.logger.record("train/update_kept", kept)
