"""Whether the same seed gives the same run twice on the device, bit for bit or how far apart."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from agents.algorithms.ppo import PPO
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Record
from text_env.vector_env import TextVectorEnv

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
    :return: how far apart two runs from one seed end.
    """
    start = time.perf_counter()
    one, other = weights_after(device, dtype), weights_after(device, dtype)
    distance = max(float((one[0][name].double() - other[0][name].double()).abs().max()) for name in one[0])
    return {
        "iterations": ITERATIONS,
        "same_weights": distance == 0.0,
        "largest_difference": distance,
        "same_texts": one[1] == other[1],
        "seconds": time.perf_counter() - start,
    }


def measure(options: Options, record: Record, which: int = 0) -> None:
    """
    :param options: resolved.
    :param record: where the figures go.
    :param which: there is but one stage.
    """
    # cuBLAS reads this when it is first used; without it, it is not deterministic and PyTorch refuses to call it so.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device(options.device or "cpu")
    needed = 5.0
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for dtype in ("float32", "bfloat16"):
            name = f"{dtype}{', deterministic algorithms' if deterministic else ''}"
            with record.attempt(name, needs=needed) as enough:
                if enough:
                    record.add(name, figure := twice(device, dtype))
                    needed = 1.3 * figure["seconds"]
    torch.use_deterministic_algorithms(False)
