"""How far the numbers of a device lie from those of the CPU, and the first ratios of PPO in each precision."""

from __future__ import annotations

import copy

import numpy as np
import torch

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.sampling import collect_texts
from benchmarks import models, rollout
from benchmarks.gpu.models import in_type, subject
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Record
from benchmarks.models import Subject
from benchmarks.precision import ratios, summary
from text_env.vector_env import TextVectorEnv

CPU = torch.device("cpu")
EPISODES, RESPONSE = 16, 32


def policies(what: Subject, env: TextVectorEnv, device: torch.device) -> dict[str, CausalLMPolicy]:
    """
    :param what: a model in float32 on the CPU.
    :param env: its environment.
    :param device: the other device.
    :return: the same weights on both, in float32 and in bfloat16 on the other one; by their names.
    """
    kinds = [(CPU, torch.float32), (device, torch.float32), (device, torch.bfloat16)]
    made = {}
    for where, dtype in dict.fromkeys(kinds):
        model = in_type(copy.deepcopy(what.model).to(where), dtype)
        name = f"{where.type} {str(dtype).removeprefix('torch.')}"
        made[name] = rollout.make_policy(what._replace(model=model), env).to(where)
    return made


def log_probs(policy: CausalLMPolicy, samples: object) -> np.ndarray:
    """
    :param policy: scores.
    :param samples: a packed batch of texts, on the CPU.
    :return: log π of every token, float64 [N].
    """
    observations = {name: x.to(policy.device) for name, x in samples.observations.items()}  # type: ignore[attr-defined]
    with torch.no_grad():
        scored = policy.evaluate_actions(observations, samples.actions.to(policy.device))[1]  # type: ignore[attr-defined]
    return scored.double().cpu().numpy()


def compare(name: str, what: Subject, device: torch.device, record: Record) -> None:
    """
    :param name: of the model.
    :param what: the model in float32 on the CPU.
    :param device: the other device.
    :param record: where the figures go.
    """
    env = rollout.make_env(what)
    made = policies(what, env, device)
    torch.manual_seed(0)
    env.reset(seed=0)
    buffer, _ = collect_texts(made["cpu float32"], env, what.episodes)
    buffer.finalize()
    samples = buffer.pack(np.arange(what.episodes))
    expected = log_probs(made["cpu float32"], samples)
    for label, policy in made.items():
        with record.attempt(f"{name}: {label}", needs=5) as enough:
            if enough:
                distance = np.abs(log_probs(policy, samples) - expected)
                figure = {
                    "tokens": len(distance),
                    "mean": float(distance.mean()),
                    "p99": float(np.quantile(distance, 0.99)),
                    "largest": float(distance.max()),
                    "first_ratio": summary(ratios(policy, env, what.episodes, 1)),
                }
                record.add(f"{name}: {label}", figure)


def measure(options: Options, record: Record, which: int = 0) -> None:
    """
    :param options: resolved; the first model's shape is compared, and the built-in model, which has learned something.
    :param record: where the figures go.
    :param which: there is but one stage.
    """
    assert options.models is not None
    assert options.prompt is not None
    device = torch.device(options.device or "cpu")
    shape = options.models[0]
    response = min(options.response or RESPONSE, RESPONSE)
    made = {
        "builtin": lambda: models.subject("builtin", CPU)._replace(episodes=EPISODES, response=response),
        shape: lambda: subject(shape, EPISODES, options.prompt or 0, response, CPU, torch.float32),
    }
    for name, make in made.items():
        with record.attempt(name, needs=5) as enough:
            if enough:
                compare(name, make(), device, record)
