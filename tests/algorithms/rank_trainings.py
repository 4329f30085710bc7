"""Trainings whose episodes are the same however many processes share them; run by itself, one process of several.

torchrun --nproc-per-node 2 tests/algorithms/rank_trainings.py DIRECTORY
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from learners import make_env, make_model, weights_of

from agents.algorithms.accelerate_engine import AccelerateEngine
from agents.algorithms.engine import Engine, launched
from agents.algorithms.fsdp_engine import FSDPEngine
from agents.state import checkpoint
from agents.state.checkpoint import Tree
from benchmarks.scale_out.trainings import SharedA2C, SharedGRPO, SharedPPO

N_EPISODES, BATCH_SIZE, UPDATES = 16, 8, 3


class OutOfMemoryOnce(SharedPPO):
    """The second process fails at the second part of its first minibatch, when the others wait for its gradient."""

    parts = 0

    def loss(self, *args: Any) -> Any:
        self.parts += 1
        if launched()[0] == 1 and self.parts == 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().loss(*args)


ADAPTER = {"lora": {"r": 4, "target_modules": "all-linear"}}
OWN_CRITIC = {"separate_critic": True, "value_bins": (-1.0, 2.0, 7), "gradient_checkpointing": True}
KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "ppo": (SharedPPO, {"n_epochs": 2, "normalize_advantage": True, "kl_target": 0.5}, {}),
    "ppo that stops early": (SharedPPO, {"n_epochs": 4, "target_kl": 1e-4}, {}),
    "ppo that runs out of memory": (OutOfMemoryOnce, {"n_epochs": 2}, {}),
    "ppo of an adapter": (
        SharedPPO,
        {"policy_kwargs": ADAPTER, "kl_estimator": "exact", "learning_rate": 1e-3, "trust_region": 1e-4},
        {},
    ),
    "ppo with a critic of its own": (SharedPPO, {"policy_kwargs": OWN_CRITIC, "critic_epochs": 1}, {}),
    "a2c": (SharedA2C, {"normalize_advantage": True, "loss_weighting": "sequence"}, {}),
    "grpo": (SharedGRPO, {"n_epochs": 2, "mask_truncated": True}, {"group_size": 4}),
}
# With weights that are cut up no process can begin a minibatch anew by itself.
CUT_UP = [kind for kind in KINDS if "memory" not in kind]


def make(kind: str, engine: type[Engine] | None = None) -> Any:
    """
    :param kind: one of :data:`KINDS`.
    :param engine: the engine; None: that of the launch.
    :return: its algorithm, before any training.
    """
    algorithm, kwargs, env_kwargs = KINDS[kind]
    torch.manual_seed(0)
    policy_kwargs = {"model": make_model("llama", ends=0.2), **kwargs.get("policy_kwargs", {})}
    return type(algorithm.__name__, (algorithm,), {"engine_class": engine})(
        "CausalLMPolicy",
        make_env(8, **env_kwargs),
        n_episodes=N_EPISODES,
        batch_size=BATCH_SIZE,
        micro_batch_tokens=48,
        seed=3,
        device="cpu",
        **{"learning_rate": 1e-4, **kwargs, "policy_kwargs": policy_kwargs},
    )


def train(model: Any) -> Tree:
    """
    :param model: what :func:`make` has made.
    :return: the weights before and after :data:`UPDATES` updates, what was logged at each, and the optimiser's moments.
    """
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
    return {
        "before": before,
        "weights": weights_of(model.policy),
        "logged": [{**row, **last} for row in logged],
        "moments": model.state()["optimizer"]["state"],
    }


def write(model: Any, directory: Path) -> None:
    """Write what becomes of a training in this process.

    :param model: the algorithm, before any training.
    :param directory: where it is written.
    """
    checkpoint.save(directory / f"rank_{launched()[0]}", train(model))


def main(directory: Path) -> None:
    """Write what becomes of every training in this process, with all weights in each and with a part of them in each.

    :param directory: where it is written.
    """
    for kind in KINDS:
        write(make(kind, AccelerateEngine), directory / "whole" / kind)
    for kind in CUT_UP:
        model = make(kind, FSDPEngine)
        write(model, directory / "cut up" / kind)
        take_apart(model, directory / "cut up" / kind)


def take_apart(model: Any, directory: Path) -> None:
    """What a process may do by itself, and what a checkpoint is good for.

    :param model: a trained algorithm whose engine cuts weights up.
    :param directory: where the policy is written.
    """
    rank, _ = launched()
    state = copy.deepcopy(model.state())
    if rank == 0:  # nobody else takes part
        model.policy.save_pretrained(directory / "policy")
        model.policy.predict(model.vector_env.reset(seed=0)[0])
    everybodys = model.engine.gather(state)[0]  # as if it had been read from a file
    model.engine.shard()
    for part in model.engine.policy.parameters():
        with torch.no_grad():
            part.zero_()
    model.engine.unshard()
    model.policy.optimizer.state.clear()
    model.load_state(everybodys)
    again = model.state()
    model.engine.shard()
    refused = ""
    try:
        model.policy.save_pretrained(directory / "refused")
    except FloatingPointError as error:
        refused = str(error)
    held = sum(part.to_local().nbytes for part in model.engine.policy.parameters())
    left = sum(whole.untyped_storage().nbytes() for whole in model.policy.parameters())
    model.engine.unshard()
    checkpoint.save(
        directory / f"state_{rank}",
        {
            "optimizer": state["optimizer"]["state"],
            "optimizer_again": again["optimizer"]["state"],
            "policy": state["policy"],
            "policy_again": model.policy.state_dict(),
            "refused": refused,
            "held": held,
            "left": left,
        },
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
