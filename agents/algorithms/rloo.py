"""REINFORCE leave-one-out (Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.objectives.advantages import leave_one_out
from agents.objectives.losses import policy_gradient
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples


class RLOO(OnPolicyAlgorithm):
    """One gradient step per rollout. The baseline of a text is the mean return of the other texts of its prompt.

    The whole text is one action, so all of its tokens have the same advantage. There is no critic. The environment's
    ``group_size`` is the number of texts per prompt. The arguments are those of ``OnPolicyAlgorithm``.
    """

    default_group_size: ClassVar[int] = 4
    whole_texts: ClassVar[bool] = True

    def estimate(self, buffer: EpisodeBuffer) -> None:
        """The return of a text minus the mean return of the others of its group, the same for each of its tokens."""
        returns = buffer.episode_sums(buffer.rewards)  # score − β Σ_t log-ratio, without discount
        advantages = leave_one_out(returns, self.vector_env.group_size)
        buffer.advantages = np.repeat(advantages, buffer.lengths).astype(np.float32)

    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The policy gradient."""
        policy_loss = policy_gradient(log_prob, samples.advantages)
        return policy_loss, {"policy_gradient_loss": policy_loss, "entropy_loss": -entropy}
