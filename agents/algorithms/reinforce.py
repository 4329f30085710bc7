"""REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696), with a choice of baselines."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.objectives.advantages import discounted_returns
from agents.objectives.losses import policy_gradient
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples


class REINFORCE(OnPolicyAlgorithm):
    """One gradient step per rollout along Σ_t (G_t − b) ∇ log π(a_t), with the return G_t and a baseline b.

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param baseline: the baseline b: ``"none"``, which is 0; ``"mean"``, the running mean of the returns of earlier
        episodes; or ``"value"``, the critic's value of the context.
    :param baseline_decay: the share of its old value that the running mean keeps after each rollout.
    :param vf_coef: the weight of the value loss, for the baseline ``"value"``.
    :param kwargs: the other arguments of ``OnPolicyAlgorithm``.
    :raises ValueError: for another baseline.
    """

    state_attributes: ClassVar[tuple[str, ...]] = (*OnPolicyAlgorithm.state_attributes, "mean_return")

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
        """The discounted returns minus the baseline."""
        mask, ended = buffer.mask, np.zeros(buffer.n_episodes)
        padded = discounted_returns(buffer.padded(buffer.rewards), ended, mask, self.gamma)  # [E, T]
        returns = padded[mask].astype(np.float32)
        if self.baseline == "value":
            buffer.returns = returns
            buffer.advantages = returns - buffer.values
        elif self.baseline == "mean":
            mean = self.engine.mean(padded[:, 0])
            # The mean of *earlier* episodes is independent of these, which keeps the gradient unbiased. The first
            # rollout has no earlier ones, and uses its own mean.
            buffer.advantages = returns - np.float32(mean if self.mean_return is None else self.mean_return)
            previous = mean if self.mean_return is None else self.mean_return
            self.mean_return = self.baseline_decay * previous + (1 - self.baseline_decay) * mean
        else:
            buffer.advantages = returns

    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The policy gradient, and with the baseline ``"value"`` the weighted value loss."""
        policy_loss = policy_gradient(log_prob, samples.advantages)
        logged = {"policy_gradient_loss": policy_loss, "entropy_loss": -entropy}
        if self.baseline != "value":
            return policy_loss, logged
        critic_loss = self.policy.value_loss(values, samples.old_values, samples.returns, clip_range=None)
        return policy_loss + self.vf_coef * critic_loss, {**logged, "value_loss": critic_loss}
