"""What an update costs with each way to compute it: time and memory beside plain updates, on a small model.

python -m benchmarks.training --json training.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from agents.algorithms.ppo import PPO
from agents.algorithms.snapshot import trained
from benchmarks import models, rollout, update
from benchmarks.provenance import provenance
from benchmarks.timing import alternate

LORA = {"lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient_checkpointing": {"policy_kwargs": {"gradient_checkpointing": True}},
    "autocast bfloat16": {"policy_kwargs": {"autocast": "bfloat16"}},
    "compile_forward": {"policy_kwargs": {"compile_forward": True}},
    "micro_batch_tokens, a text at a time": {"micro_batch_tokens": 1},
    "LoRA": {"policy_kwargs": LORA},
    "LoRA, gradient_checkpointing": {"policy_kwargs": {**LORA, "gradient_checkpointing": True}},
    "Adafactor": {"policy_kwargs": {"optimizer_class": "adafactor"}},
}


def ppo(subject: models.Subject, way: dict[str, Any]) -> PPO:
    """
    :param subject: of which a copy is trained.
    :param way: one of :data:`WAYS`.
    :return: PPO after one iteration.
    """
    model = subject.own_copy().model
    algorithm = PPO(
        "CausalLMPolicy",
        rollout.make_env(subject),
        learning_rate=update.LEARNING_RATE,
        n_episodes=subject.episodes,
        batch_size=update.minibatch(subject.episodes),
        n_epochs=update.EPOCHS,
        seed=0,
        device=model.device,
        **{**way, "policy_kwargs": {"model": model, "separate_critic": False, **way.get("policy_kwargs", {})}},
    )
    return algorithm.learn(subject.episodes * subject.response)


def kept_bytes(algorithm: PPO) -> int:
    """
    :param algorithm: with a rollout in its buffer.
    :return: the most that a forward pass of an update keeps for its backward pass, weights apart: an exact count.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in algorithm.policy.parameters()}
    kept: dict[int, int] = {}
    most = 0
    engine: Any = algorithm.engine
    backward: Callable[..., None] = engine.backward

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def look_then_backward(*args: Any) -> None:
        nonlocal most
        most = max(most, sum(kept.values()))
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            backward(*args)

    engine.backward = look_then_backward
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        assert algorithm.update(), "an update that was undone keeps less"
    del engine.backward
    return most


def state_bytes(algorithm: PPO) -> int:
    """
    :param algorithm: after an update.
    :return: the gradient of the trained weights, and what the optimiser remembers.
    """
    states = algorithm.policy.optimizer.state.values()
    moments = [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(tensor.nbytes for tensor in (*trained(algorithm.policy), *moments))


def measured(subject: models.Subject, names: Sequence[str], repeats: int) -> dict[str, dict[str, float]]:
    """
    :param subject: model and sizes.
    :param names: of :data:`WAYS`, besides ``"plain"``.
    :param repeats: of each update.
    :return: of each way the time of an update, what the forward pass keeps and what the optimiser takes, all as a part
        of plain updates'.
    """
    algorithms = {name: ppo(subject, WAYS[name]) for name in dict.fromkeys(("plain", *names))}
    kept = {name: kept_bytes(algorithm) for name, algorithm in algorithms.items()}
    state = {name: state_bytes(algorithm) for name, algorithm in algorithms.items()}
    speeds = alternate({name: update.update(algorithm) for name, algorithm in algorithms.items()}, repeats)
    return {
        name: {
            "time": float(np.median([a / b for a, b in zip(speeds["plain"], speeds[name], strict=True)])),
            "kept_for_backward": kept[name] / kept["plain"],
            "gradient_and_optimizer": state[name] / state["plain"],
            "kept_for_backward_bytes": kept[name],
            "gradient_and_optimizer_bytes": state[name],
        }
        for name in algorithms
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: of the command line; by default the process's.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=16, help="a multiple of 4")
    parser.add_argument("--response", type=int, default=120)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    origin = provenance("benchmarks.training", arguments, torch.device(args.device))
    torch.manual_seed(0)
    subject = models.subject("gpt2-4m", torch.device(args.device))
    figures = measured(subject._replace(episodes=args.episodes, response=args.response), args.ways, args.repeats)
    report = {
        **origin,
        "threads": torch.get_num_threads(),
        "figures": figures,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    table = Table("beside plain updates", "time", "kept for the backward pass", "gradient and optimiser")
    for name, figure in figures.items():
        numbers = (figure[key] for key in ("time", "kept_for_backward", "gradient_and_optimizer"))
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
