"""REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696), with the baseline as an argument."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.objectives.advantages import discounted_returns
from agents.objectives.losses import policy_gradient, value_loss
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples


class REINFORCE(OnPolicyAlgorithm):
    """One gradient step a rollout, along Σ_t (G_t − b) ∇ log π(a_t).

    :param policy: see ``OnPolicyAlgorithm``, like every argument that isn't named here.
    :param env: likewise.
    :param baseline: b: ``"none"``; ``"mean"``, the running mean of past episodes' returns; ``"value"``, the critic's
        value of the context.
    :param baseline_decay: of the running mean, per rollout.
    :param vf_coef: weight of the value loss, for ``"value"``.
    :raises ValueError: for another baseline.
    """

    state_attributes: ClassVar[tuple[str, ...]] = ("mean_return",)

    def __init__(
        self,
        policy: Any,
        env: Any,
        baseline: Literal["none", "mean", "value"] = "mean",
        baseline_decay: float = 0.9,
        vf_coef: float = 0.1,
        **kwargs: Any,
    ) -> None:
        if baseline not in ("none", "mean", "value"):
            raise ValueError(f"Expected baseline to be 'none', 'mean' or 'value', got {baseline!r}.")
        self.baseline = baseline
        self.baseline_decay = baseline_decay
        self.vf_coef = vf_coef
        self.mean_return: float | None = None
        super().__init__(policy, env, **kwargs)

    def estimate(self, buffer: EpisodeBuffer) -> None:
        mask, ended = buffer.mask, np.zeros(buffer.n_episodes)
        padded = discounted_returns(buffer.padded(buffer.rewards), ended, mask, self.gamma)  # [E, T]
        returns = padded[mask].astype(np.float32)
        if self.baseline == "value":
            buffer.returns = returns
            buffer.advantages = returns - buffer.values
        elif self.baseline == "mean":
            mean = self.engine.mean(padded[:, 0])
            # The mean of *past* episodes is independent of these, which keeps the gradient unbiased; the first rollout
            # has no past, and takes its own.
            buffer.advantages = returns - np.float32(mean if self.mean_return is None else self.mean_return)
            previous = mean if self.mean_return is None else self.mean_return
            self.mean_return = self.baseline_decay * previous + (1 - self.baseline_decay) * mean
        else:
            buffer.advantages = returns

    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy_loss = policy_gradient(log_prob, samples.advantages)
        logged = {"policy_gradient_loss": policy_loss, "entropy_loss": -entropy}
        if self.baseline != "value":
            return policy_loss, logged
        critic_loss = value_loss(values, samples.old_values, samples.returns, clip_range=None)
        return policy_loss + self.vf_coef * critic_loss, {**logged, "value_loss": critic_loss}
