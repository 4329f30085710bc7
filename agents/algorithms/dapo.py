"""Decoupled clip and dynamic sampling policy optimisation (Yu et al. 2025, https://arxiv.org/abs/2503.14476)."""

from __future__ import annotations

from typing import Any

import numpy as np

from agents.algorithms.group_relative import GroupRelative
from agents.algorithms.on_policy import Collect
from agents.objectives.advantages import informative_groups


class DAPO(GroupRelative):
    """GRPO that spends its gradient on prompts from which something can be learned.

    A group whose texts all have the same score has only advantages of 0. Such groups are replaced by those of other
    prompts (dynamic sampling). The upper bound of clipping is higher than the lower one, every token has the same
    weight, and there is no KL penalty. The paper also leaves cut texts out of the loss (``mask_truncated=True``) or
    charges for length near the budget (the reward ``overlong``).

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param clip_range_high: how far above 1 a ratio counts, as for ``Surrogate``.
    :param kl_coef: β, as for ``OnPolicyAlgorithm``.
    :param max_sampling_rounds: how often at most the groups that are missing are sampled. What is missing then is
        filled up with groups whose scores are all the same, so a rollout always has ``n_episodes``. With 1 there is no
        dynamic sampling.
    :param kwargs: the other arguments of ``GroupRelative``, ``Surrogate`` and ``OnPolicyAlgorithm``.
    :raises ValueError: if ``max_sampling_rounds`` is less than 1.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        clip_range_high: float | None = 0.28,
        kl_coef: float = 0.0,
        max_sampling_rounds: int = 10,
        **kwargs: Any,
    ) -> None:
        self.max_sampling_rounds = max_sampling_rounds
        self._sampled: list[float] = []  # the scores of all texts, also of those that are left out
        self._rounds = 0
        super().__init__(policy, env, clip_range_high=clip_range_high, kl_coef=kl_coef, **kwargs)

    def sample(self, collect: Collect) -> list[dict[str, Any]]:
        """Sample groups until the rollout is full of those whose texts are paid differently."""
        self.buffer.reset()
        n_episodes = self.engine.share(self.n_episodes)
        rollout: list[dict[str, Any]] = []
        self._sampled = []
        for round_number in range(1, self.max_sampling_rounds + 1):
            sampled = self.new_buffer()
            episodes = collect(n_episodes - len(rollout), sampled)
            self._sampled += [episode["score"] for episode in episodes]
            penalty = self.missing_eos_penalty or 0.0
            paid = [e["score"] - penalty * (e["finish_reason"] == "length") for e in episodes]
            kept = informative_groups(np.array(paid), self.vector_env.group_size)
            if round_number == self.max_sampling_rounds:
                kept[:] = True
            self.buffer.extend(sampled, np.flatnonzero(kept))
            rollout += [episodes[number] for number in np.flatnonzero(kept)]
            if len(rollout) == n_episodes:
                break
        self._rounds = round_number
        return rollout

    def _log_rollout(self, episodes: list[dict[str, Any]]) -> None:
        """As the base class's, and what was sampled to get there. Not before: processes agree on no number as long as
        a callback may have stopped one of them.
        """
        super()._log_rollout(episodes)
        self.logger.record("objective/sampled_scores", self.engine.mean(np.array(self._sampled)))
        self.logger.record("rollout/sampled_episodes", self.engine.total(len(self._sampled)))
        self.logger.record("rollout/sampling_rounds", self.engine.largest(self._rounds))
