"""What PPO and A2C have in common: a learned critic, the advantages that it gives, and how it is fitted."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ranges import RANGES
from agents.objectives.advantages import length_adaptive_lambda
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples


class ActorCritic(OnPolicyAlgorithm):
    """The base class of algorithms with a learned critic, which define :meth:`policy_loss`.

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param gae_lambda: λ of generalized advantage estimation, for the policy's advantages. With 1 nothing of the return
        is replaced by the critic's values.
    :param gae_lambda_value: λ of the critic's targets; None: that of the policy. With 1 they are Monte-Carlo returns,
        which have no bias from the critic itself (VC-PPO, Yuan et al. 2025, https://arxiv.org/abs/2503.01491).
    :param length_adaptive_alpha: α of VAPO's length-adaptive λ = 1 − 1/(α · length), which replaces ``gae_lambda``
        (Yue et al. 2025, https://arxiv.org/abs/2504.05118, who use 0.05); None: ``gae_lambda`` for all lengths.
    :param clip_range_vf: ε of value clipping; None: no value clipping.
    :param vf_coef: the weight of the value loss. With 0 the critic learns only from ``critic_epochs``, and a value head
        on the policy's decoder never changes that decoder.
    :param ent_coef: the weight of an entropy bonus.
    :param critic_learning_rate: the critic's learning rate, as ``learning_rate``; None: that of the policy.
    :param critic_epochs: the number of further passes over each rollout for the critic alone, after the update.
    :param critic_warmup_episodes: the number of episodes at the start from which only the critic learns (VC-PPO's value
        pretraining), by Monte-Carlo returns of the policy as it is.
    :param critic_warmup_epochs: the number of passes over these.
    :param kwargs: the other arguments of ``OnPolicyAlgorithm``.
    :raises ValueError: if a number is out of range.
    """

    state_attributes: ClassVar[tuple[str, ...]] = (*OnPolicyAlgorithm.state_attributes, "critic_warmup_left")
    given_anew: ClassVar[Mapping[str, str]] = {
        **OnPolicyAlgorithm.given_anew,
        "critic_warmup_episodes": "critic_warmup_left",
    }

    def __init__(
        self,
        policy: Any,
        env: Any,
        gae_lambda: float = 0.95,
        gae_lambda_value: float | None = None,
        length_adaptive_alpha: float | None = None,
        clip_range_vf: float | None = None,
        vf_coef: float = 0.1,
        ent_coef: float = 0.0,
        critic_learning_rate: float | Schedule | None = None,
        critic_epochs: int = 0,
        critic_warmup_episodes: int = 0,
        critic_warmup_epochs: int = 4,
        **kwargs: Any,
    ) -> None:
        self.gae_lambda = gae_lambda
        self.gae_lambda_value = gae_lambda_value
        self.length_adaptive_alpha = length_adaptive_alpha
        self.clip_range_vf = clip_range_vf
        self.vf_coef = vf_coef
        self.ent_coef = ent_coef
        self.critic_learning_rate = critic_learning_rate
        self.critic_epochs = critic_epochs
        self.critic_warmup_episodes = critic_warmup_episodes
        self.critic_warmup_epochs = critic_warmup_epochs
        self.critic_warmup_left = critic_warmup_episodes
        super().__init__(policy, env, **kwargs)

    @abstractmethod
    def policy_loss(
        self, samples: EpisodeSamples, log_prob: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The policy's part of the loss.

        :param samples: a packed batch of N actions.
        :param log_prob: the log-probabilities of the actions under the policy that is trained, [N].
        :return: the losses, [N]; and what else to log, by name, [N] each.
        """

    def estimate(self, buffer: EpisodeBuffer) -> None:
        """Advantages and the critic's targets by generalized advantage estimation."""
        policy_lambda: float | np.ndarray = self.gae_lambda
        if self.length_adaptive_alpha is not None:
            policy_lambda = length_adaptive_lambda(buffer.lengths, self.length_adaptive_alpha)
        value_lambda = 1.0 if self.critic_warmup_left > 0 else self.gae_lambda_value
        buffer.estimate_gae(self.gamma, policy_lambda, gae_lambda_value=value_lambda)

    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The policy's loss, the weighted value loss, and minus the weighted entropy."""
        policy_loss, logged = self.policy_loss(samples, log_prob)
        critic_loss = self.policy.value_loss(values, samples.old_values, samples.returns, self.clip_range_vf)
        loss = policy_loss
        if self.vf_coef:
            loss = policy_loss + self.vf_coef * critic_loss
        if self.ent_coef:  # the gradient of the entropy is expensive, and not needed with a weight of 0
            loss = loss - self.ent_coef * entropy
        common = {"policy_gradient_loss": policy_loss, "value_loss": critic_loss, "entropy_loss": -entropy}
        return loss, {**common, **logged}

    def train(self) -> None:
        """Update the policy and the critic, or during the critic's warm-up the critic alone."""
        if self.critic_warmup_left > 0:
            self.fit_critic(self.critic_warmup_epochs)
            self.critic_warmup_left = max(0, self.critic_warmup_left - self.n_episodes)
            self.logger.record("train/explained_variance", self._explained_variance())
            return
        self.update_policy()
        if self.critic_epochs:
            self.fit_critic(self.critic_epochs)

    def update_policy(self) -> None:
        """The update of policy and critic together."""
        super().train()

    def fit_critic(self, n_epochs: int) -> None:
        """Fit the critic's values to the targets of the rollout, with the weights that tokens have in the loss. No
        other weight changes.

        :param n_epochs: the number of passes over the rollout.
        """
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        losses = []
        for minibatch in itertools.chain.from_iterable(self._epochs(n_epochs)):
            means = self.gradient(minibatch, self._critic_losses)
            if means:  # something in it has a weight
                self.engine.clip(self.max_grad_norm, means["grad_norm"])
                self.engine.step()
                losses.append(means["loss"])
        if losses:
            self.logger.record("train/critic_loss", float(np.mean(losses)))

    def _critic_losses(self, part: np.ndarray) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        samples = self.buffer.pack(part)
        predictions = self.engine.policy.evaluate_critic(samples.observations)
        return self.policy.value_loss(predictions, samples.old_values, samples.returns, None), {}

    def learning_rates(self) -> tuple[float, float]:
        """As the base class says; the critic may have a schedule of its own."""
        actor, critic = super().learning_rates()
        if self.critic_learning_rate is not None:
            critic = FloatSchedule(self.critic_learning_rate)(self._current_progress_remaining)
            RANGES["critic_learning_rate"].check("critic_learning_rate", critic)
            self.logger.record("train/critic_learning_rate", critic)
        return actor, critic
