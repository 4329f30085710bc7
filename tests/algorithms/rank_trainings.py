"""Trainings whose episodes are the same however many processes share them; run by itself, one process of several.

torchrun --nproc-per-node 2 tests/algorithms/rank_trainings.py DIRECTORY
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learners import PROMPTS, make_env, make_model, weights_of

from agents.algorithms.a2c import A2C
from agents.algorithms.engine import launched
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import Collect
from agents.algorithms.ppo import PPO
from agents.rollouts.collector import collect_episodes
from agents.state import checkpoint

N_EPISODES, BATCH_SIZE, RANKS, UPDATES = 16, 8, 2, 3


class OfWholeRollout:
    """Mixed into an algorithm: episode e of update i begins in its own way and goes on with the most probable tokens,
    and the minibatches of one process are those of two processes put together.
    """

    def sample(self: Any, collect: Collect) -> list[dict[str, Any]]:
        share = self.engine.share(N_EPISODES)
        own = range(self.engine.rank * share, (self.engine.rank + 1) * share)
        size = self.vector_env.group_size
        prompts = [PROMPTS[e // size % len(PROMPTS)] for e in own]
        beginnings = [[2 + (37 * e + 61 * self._iterations + k) % 290 for k in range(1 + e % 3)] for e in own]
        episodes = collect_episodes(
            self.policy, self.vector_env, share, self.buffer, True, prompts=prompts, responses=beginnings
        )
        self.num_timesteps += sum(episode["length"] for episode in episodes)
        return episodes

    def _epochs(self: Any, n_epochs: int) -> Iterator[list[np.ndarray]]:
        n, size = N_EPISODES // RANKS, BATCH_SIZE // RANKS
        shares = [np.arange(n)] if launched()[1] > 1 else [np.arange(n) + rank * n for rank in range(RANKS)]
        for _ in range(n_epochs):
            yield [np.concatenate([share[k : k + size] for share in shares]) for k in range(0, n, size)]


class SharedPPO(OfWholeRollout, PPO):
    pass


class OutOfMemoryOnce(SharedPPO):
    """The second process fails at the second part of its first minibatch, when the others wait for its gradient."""

    parts = 0

    def loss(self, *args: Any) -> Any:
        self.parts += 1
        if launched()[0] == 1 and self.parts == 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().loss(*args)


class SharedA2C(OfWholeRollout, A2C):
    pass


class SharedGRPO(OfWholeRollout, GRPO):
    pass


KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "ppo": (SharedPPO, {"n_epochs": 2, "normalize_advantage": True, "kl_target": 0.5}, {}),
    "ppo that stops early": (SharedPPO, {"n_epochs": 4, "target_kl": 1e-4}, {}),
    "ppo that runs out of memory": (OutOfMemoryOnce, {"n_epochs": 2}, {}),
    "a2c": (SharedA2C, {"normalize_advantage": True, "loss_weighting": "sequence"}, {}),
    "grpo": (SharedGRPO, {"n_epochs": 2, "mask_truncated": True}, {"group_size": 4}),
}


def trained(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict[str, Any]]]:
    """
    :param kind: one of :data:`KINDS`.
    :return: the weights before and after :data:`UPDATES` updates, and what was logged at each.
    """
    algorithm, kwargs, env_kwargs = KINDS[kind]
    torch.manual_seed(0)
    model = algorithm(
        "CausalLMPolicy",
        make_env(8, **env_kwargs),
        policy_kwargs={"model": make_model("llama", ends=0.2)},
        n_episodes=N_EPISODES,
        batch_size=BATCH_SIZE,
        learning_rate=1e-4,
        micro_batch_tokens=48,
        seed=3,
        device="cpu",
        **kwargs,
    )
    before = weights_of(model.policy)
    logged: list[dict[str, Any]] = []
    dump = model._dump_logs

    def keep_then_dump(iteration: int) -> None:
        dump_all = model.logger.dump
        model.logger.dump = lambda step=0: logged.append(dict(model.logger.name_to_value))
        dump(iteration)
        model.logger.dump = dump_all
        model.logger.dump(model.num_timesteps)

    model._dump_logs = keep_then_dump
    while len(logged) < UPDATES:
        model.learn(1, reset_num_timesteps=not logged)
    last = {"lengths": model.buffer.lengths.tolist(), "micro_batch_tokens": model.micro_batch_tokens}
    return before, weights_of(model.policy), [{**row, **last} for row in logged]


def main(directory: Path) -> None:
    """Write what became of every training in this process.

    :param directory: where it is written.
    """
    rank, _ = launched()
    for number, kind in enumerate(KINDS):
        before, after, logged = trained(kind)
        checkpoint.save(directory / f"{number}_of_{rank}", {"before": before, "weights": after, "logged": logged})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
