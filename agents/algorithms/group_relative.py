"""What GRPO and DAPO have in common: a text's score beside those of the prompt's other texts, and the loss."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from agents.algorithms.surrogate import Surrogate
from agents.objectives.advantages import group_relative
from agents.objectives.kl import kl_k3
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples


class GroupRelative(Surrogate):
    """The base class of algorithms with PPO's surrogate, and with groups of texts in the place of a critic.

    The KL penalty is a term of the loss, with the estimator k3. The environment's ``group_size`` is the number of texts
    per prompt.

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param scale_rewards: whether to divide advantages by the standard deviation of the group's scores.
    :param kwargs: the other arguments of ``Surrogate`` and ``OnPolicyAlgorithm``.
    """

    default_group_size: ClassVar[int] = 4
    kl_in_reward: ClassVar[bool] = False
    advantages_have_unit_of_rewards: ClassVar[bool] = False
    whole_texts: ClassVar[bool] = True

    def __init__(self, policy: Any, env: Any, scale_rewards: bool = True, **kwargs: Any) -> None:
        self.scale_rewards = scale_rewards
        super().__init__(policy, env, **kwargs)

    def estimate(self, buffer: EpisodeBuffer) -> None:
        """The score of a text minus the mean of its group, the same for each of its tokens. There are no returns."""
        scores = buffer.episode_sums(buffer.rewards)
        advantages = group_relative(scores, self.vector_env.group_size, self.scale_rewards)
        buffer.advantages = np.repeat(advantages, buffer.lengths).astype(np.float32)

    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The surrogate, and the weighted KL divergence from the reference by the estimator k3."""
        policy_loss, logged = self.surrogate_loss(samples, log_prob)
        kl_loss = kl_k3(log_prob - samples.ref_log_prob)
        return policy_loss + self.kl.coef * kl_loss, {
            "policy_gradient_loss": policy_loss,
            "kl_loss": kl_loss,
            "entropy_loss": -entropy,
            **logged,
        }
