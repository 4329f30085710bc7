"""An algorithm of one's own: Dr. GRPO (Liu et al. 2025, https://arxiv.org/abs/2503.20783), GRPO without its two biases.

GRPO divides advantages by the standard deviation of their group, which favours prompts that are too easy or too hard,
and every text by its length, which favours long wrong answers. Dr. GRPO does neither: what a token counts is the same
in texts of every length. The KL penalty is in the reward here, as the shared loop pays it by default; without one this
is ``GRPO(..., loss_weighting="constant", scale_rewards=False)``.

textrlhf train --algo examples.dr_grpo:DrGRPO --run-dir runs/dr_grpo
"""

import numpy as np
import torch

from agents import EpisodeBuffer, EpisodeSamples, OnPolicyAlgorithm
from agents.objectives.losses import clipped_surrogate


class DrGRPO(OnPolicyAlgorithm):
    default_group_size = 4  # texts of a prompt, in an environment that is made by name

    def __init__(self, policy, env, clip_range: float = 0.2, loss_weighting="constant", **kwargs):
        self.clip_range = clip_range
        super().__init__(policy, env, loss_weighting=loss_weighting, **kwargs)

    def estimate(self, buffer: EpisodeBuffer) -> None:
        scores = buffer.episode_sums(buffer.rewards).reshape(-1, self.vector_env.group_size)
        advantages = scores - scores.mean(axis=1, keepdims=True)
        buffer.advantages = np.repeat(advantages.flatten(), buffer.lengths).astype(np.float32)

    def loss(self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor):
        loss = clipped_surrogate(log_prob - samples.old_log_prob, samples.advantages, self.clip_range)
        return loss, {"policy_gradient_loss": loss, "entropy_loss": -entropy}
