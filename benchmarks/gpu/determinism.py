"""Whether the same seed gives the same run twice on the device, bit for bit or how far apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from agents.algorithms.ppo import PPO
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Record
from text_env.vector_env import TextVectorEnv

ROOT = Path(__file__).parents[2]
ITERATIONS, EPISODES, RESPONSE = 3, 16, 32

Weights = dict[str, torch.Tensor]


def weights_after(device: torch.device, dtype: str) -> tuple[Weights, list[int]]:
    """Train the built-in model from a seed.

    :param device: where.
    :param dtype: of its weights.
    :return: the policy's weights after some iterations of PPO, on the CPU, and the tokens that it wrote last.
    """
    env = TextVectorEnv(EPISODES, tokenizer="builtin", prompts="builtin", reward="builtin", max_new_tokens=RESPONSE)
    algorithm = PPO(
        "CausalLMPolicy",
        env,
        n_episodes=EPISODES,
        batch_size=EPISODES // 2,
        n_epochs=2,
        seed=0,
        device=device,
        policy_kwargs={"model": "builtin", "dtype": dtype},
    )
    for _ in range(ITERATIONS):
        algorithm.learn(1, reset_num_timesteps=False, log_interval=0)
    # A copy: on the CPU the weights themselves would go on changing.
    weights = {name: x.detach().cpu().clone() for name, x in algorithm.policy.state_dict().items()}
    return weights, algorithm.buffer.actions.tolist()


def twice(device: torch.device, dtype: str) -> dict[str, Any]:
    """
    :param device: where.
    :param dtype: of the weights.
    :return: how far apart two runs from one seed end, and what PyTorch warned of meanwhile.
    """
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        one, other = weights_after(device, dtype), weights_after(device, dtype)
    distance = max(float((one[0][name].double() - other[0][name].double()).abs().max()) for name in one[0])
    return {
        "iterations": ITERATIONS,
        "same_weights": distance == 0.0,
        "largest_difference": distance,
        "same_texts": one[1] == other[1],
        "seconds": time.perf_counter() - start,
        "warnings": sorted({str(warning.message)[:200] for warning in warned}),
    }


def strictly(device: str, dtype: str, seconds: float) -> dict[str, Any]:
    """:func:`twice` with deterministic algorithms, in a process of its own: cuBLAS reads its variable when it is first
    used, and without it PyTorch doesn't take it for deterministic.

    :param seconds: after which it is stopped.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.determinism", device, dtype]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, timeout=seconds, check=True)
    figure: dict[str, Any] = json.loads(done.stdout)
    return figure


def measure(options: Options, record: Record, which: int = 0) -> None:
    """
    :param options: resolved.
    :param record: where the figures go.
    :param which: there is but one stage.
    """
    device, needed = options.device or "cpu", 5.0
    for deterministic in (False, True):
        for dtype in ("float32", "bfloat16"):
            name = f"{dtype}{', deterministic algorithms' if deterministic else ''}"
            with record.attempt(name, needs=needed) as enough:
                if enough and deterministic:
                    record.add(name, strictly(device, dtype, record.seconds_left - 2))
                elif enough:
                    record.add(name, figure := twice(torch.device(device), dtype))
                    needed = 1.3 * figure["seconds"]


def main(device: str, dtype: str) -> None:
    """What :func:`strictly` starts."""
    # Sampling adds probabilities up on CUDA in no fixed order, which would be an error.
    torch.use_deterministic_algorithms(True, warn_only=True)
    print(json.dumps(twice(torch.device(device), dtype)))


if __name__ == "__main__":
    main(*sys.argv[1:])
