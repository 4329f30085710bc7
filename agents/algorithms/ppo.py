"""Proximal policy optimisation (Schulman et al. 2017, https://arxiv.org/abs/1707.06347), as it is used for language
models.

``docs/ppo.md`` explains it line by line.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from stable_baselines3.common.type_aliases import Schedule

from agents.algorithms.actor_critic import ActorCritic
from agents.algorithms.surrogate import Surrogate
from agents.algorithms.trust_region import TrustRegion
from agents.rollouts.episode_buffer import EpisodeSamples


class PPO(Surrogate, ActorCritic):
    """Several minibatches per rollout, with the clipped surrogate and a learned critic.

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param learning_rate: the learning rate. The default is lower than that of the algorithms that take one step per
        rollout.
    :param n_episodes: the number of episodes of a rollout.
    :param batch_size: the number of episodes of a minibatch; None: all of the rollout.
    :param n_epochs: the number of passes over a rollout.
    :param clip_range_vf: ε of value clipping; None: no value clipping.
    :param trust_region: the largest KL divergence from the policy that sampled, in nats per *episode*, that an update
        may reach. A longer update is shortened, and the learning rate of the next ones is lowered as long as they would
        be too long; None: no limit.
    :param normalize_advantage: as for ``OnPolicyAlgorithm``.
    :param positive_lm_coef: the weight of −log π of the tokens of good texts, which are imitated in addition (VAPO, Yue
        et al. 2025, https://arxiv.org/abs/2504.05118, who take 0.1, for right answers). The mean is over the tokens of
        all texts, in place of VAPO's over those of good ones.
    :param positive_score: the score from which on a text is a good one.
    :param kwargs: the other arguments of ``Surrogate``, ``ActorCritic`` and ``OnPolicyAlgorithm``.
    :raises ValueError: if a number is out of range.
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
        clip_range_vf: float | None = 0.2,
        trust_region: float | None = None,
        normalize_advantage: bool | Literal["group"] = True,
        positive_lm_coef: float = 0.0,
        positive_score: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if trust_region is not None and not trust_region > 0:
            raise ValueError(f"Expected a trust_region > 0 nats per episode, or None, got {trust_region}.")
        if not positive_lm_coef >= 0:
            raise ValueError(f"Expected positive_lm_coef >= 0, got {positive_lm_coef}.")
        self.trust_region = trust_region
        self.positive_lm_coef = positive_lm_coef
        self.positive_score = positive_score
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
        """The surrogate, and the weighted negative log-likelihood of good texts."""
        loss, logged = self.surrogate_loss(samples, log_prob)
        if self.positive_lm_coef:
            lm_loss = -log_prob * (samples.scores >= self.positive_score)
            loss = loss + self.positive_lm_coef * lm_loss
            logged = {**logged, "positive_lm_loss": lm_loss}
        return loss, logged

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
