"""Trainings whose texts are the same however many processes share them, so that their weights can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from agents.algorithms.a2c import A2C
from agents.algorithms.engine import launched
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import Collect
from agents.algorithms.ppo import PPO
from agents.rollouts.collector import collect_episodes

RANKS = 2


class OfWholeRollout:
    """Mixed into an algorithm: every text has a beginning of its own, of up to half of the budget, and goes on with the
    most probable tokens; and the minibatches of one process are those of :data:`RANKS` processes put together.
    """

    def sample(self: Any, collect: Collect) -> list[dict[str, Any]]:
        env, share = self.vector_env, self.engine.share(self.n_episodes)
        own = range(self.engine.rank * share, (self.engine.rank + 1) * share)
        tokens = [i for i in range(2, int(env.single_action_space.n)) if i not in env.eos_token_ids]
        prompts = [env.prompts[e // env.group_size % len(env.prompts)] for e in own]
        given = [1 + (5 * e + e // 3) % (env.max_new_tokens // 2) for e in own]
        firsts = [37 * e + 61 * self._iterations for e in own]
        beginnings = [[tokens[(i + k) % len(tokens)] for k in range(n)] for i, n in zip(firsts, given, strict=True)]
        episodes = collect_episodes(self.policy, env, share, self.buffer, True, prompts=prompts, responses=beginnings)
        self.num_timesteps += sum(episode["length"] for episode in episodes)
        return episodes

    def _epochs(self: Any, n_epochs: int) -> Iterator[list[np.ndarray]]:
        n, size = self.n_episodes // RANKS, self.batch_size // RANKS
        shares = [np.arange(n)] if launched()[1] > 1 else [np.arange(n) + rank * n for rank in range(RANKS)]
        for _ in range(n_epochs):
            yield [np.concatenate([share[k : k + size] for share in shares]) for k in range(0, n, size)]


class SharedPPO(OfWholeRollout, PPO):
    pass


class SharedA2C(OfWholeRollout, A2C):
    pass


class SharedGRPO(OfWholeRollout, GRPO):
    pass
