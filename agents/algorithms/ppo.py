"""Proximal policy optimisation (Schulman et al. 2017, https://arxiv.org/abs/1707.06347), as it is used for language
models. ``docs/ppo.md`` explains it line by line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from stable_baselines3.common.type_aliases import Schedule

from agents.algorithms.actor_critic import ActorCritic
from agents.algorithms.surrogate import Surrogate
from agents.models.critic import critic_for
from agents.models.pretrained import is_adapter
from agents.rollouts.episode_buffer import EpisodeSamples
from text_env.vector_env import TextVectorEnv


class PPO(Surrogate, ActorCritic):
    """Several minibatches per rollout, with the clipped surrogate and a learned critic.

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param learning_rate: the learning rate.
    :param n_episodes: the number of episodes of a rollout.
    :param batch_size: the number of episodes of a minibatch; None: all of the rollout.
    :param n_epochs: the number of passes over a rollout.
    :param gae_lambda: λ of the advantages. None: 0.9 for a critic that starts as the reward model and can be relied on
        from the first text on; 0.98 for any other, whose early values would hide what a text was paid at its end.
    :param gae_lambda_value: λ of the critic's targets; None: that of the advantages.
    :param clip_range_vf: ε of value clipping; None: no value clipping.
    :param normalize_advantage: as for ``OnPolicyAlgorithm``.
    :param trust_region: as for ``Surrogate``.
    :param positive_lm_coef: the weight of −log π of the tokens of good texts, which are imitated in addition (VAPO, Yue
        et al. 2025, https://arxiv.org/abs/2504.05118, who take 0.1, for right answers). The mean is over the tokens of
        all texts, in place of VAPO's over those of good ones.
    :param positive_score: the score from which on a text is a good one.
    :param kwargs: the other arguments of ``Surrogate``, ``ActorCritic`` and ``OnPolicyAlgorithm``.
    :raises ValueError: if a number is out of range.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        learning_rate: float | Schedule = 3e-4,
        n_episodes: int = 64,
        batch_size: int | None = 16,
        n_epochs: int = 2,
        gae_lambda: float | None = None,
        gae_lambda_value: float | None = 1.0,
        clip_range_vf: float | None = 0.2,
        normalize_advantage: bool | Literal["group"] = True,
        trust_region: float | None = 8.0,
        positive_lm_coef: float = 0.0,
        positive_score: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.positive_lm_coef = positive_lm_coef
        self.positive_score = positive_score
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_episodes=n_episodes,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gae_lambda=0.98 if gae_lambda is None else gae_lambda,
            gae_lambda_value=gae_lambda_value,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            trust_region=trust_region,
            **kwargs,
        )
        if gae_lambda is None and isinstance(self.policy_kwargs.get("separate_critic"), str | Path):
            self.gae_lambda = 0.9

    def default_policy_kwargs(self, env: TextVectorEnv, policy_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A critic of its own, so that what it learns doesn't move the policy; not beside an adapter, which is chosen
        where memory is scarce.
        """
        if policy_kwargs.get("lora") is not None or is_adapter(policy_kwargs.get("model")):
            return {}
        copied = policy_kwargs.get("value_bins") is not None
        return {"separate_critic": copied or critic_for(env.episodes.reward, env.tokenizer)}

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
