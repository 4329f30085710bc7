"""Group relative policy optimisation (Shao et al. 2024, https://arxiv.org/abs/2402.03300)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.objectives.advantages import group_relative
from agents.objectives.kl import kl_k3
from agents.objectives.losses import clipped_surrogate
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples


class GRPO(OnPolicyAlgorithm):
    """PPO's clipped surrogate without a critic. A text's score is compared with those of the prompt's other texts.

    As in the paper, the KL penalty is a term of the loss, with the estimator k3, and every *text* has the same weight,
    whatever its length. The environment's ``group_size`` is the number of texts per prompt.

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param clip_range: ε of the clipped surrogate.
    :param scale_rewards: whether to divide advantages by the standard deviation of the group's scores.
    :param kwargs: the other arguments of ``OnPolicyAlgorithm``.
    """

    default_group_size: ClassVar[int] = 4
    kl_in_reward: ClassVar[bool] = False

    def __init__(
        self, policy: Any, env: Any, clip_range: float = 0.2, scale_rewards: bool = True, **kwargs: Any
    ) -> None:
        self.clip_range = clip_range
        self.scale_rewards = scale_rewards
        super().__init__(policy, env, **kwargs)

    def estimate(self, buffer: EpisodeBuffer) -> None:
        """The score of a text minus the mean of its group, the same for each of its tokens. There are no returns."""
        scores = buffer.episode_sums(buffer.rewards)
        advantages = group_relative(scores, self.vector_env.group_size, self.scale_rewards)
        buffer.advantages = np.repeat(advantages, buffer.lengths).astype(np.float32)

    def token_weights(self, lengths: np.ndarray) -> np.ndarray:
        """One over the length of the episode, so that every text has the same weight."""
        return 1.0 / lengths

    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The clipped surrogate, and the weighted KL divergence from the reference by the estimator k3."""
        policy_loss = clipped_surrogate(log_prob - samples.old_log_prob, samples.advantages, self.clip_range)
        kl_loss = kl_k3(log_prob - samples.ref_log_prob)
        return policy_loss + self.kl.coef * kl_loss, {
            "policy_gradient_loss": policy_loss,
            "kl_loss": kl_loss,
            "entropy_loss": -entropy,
        }
