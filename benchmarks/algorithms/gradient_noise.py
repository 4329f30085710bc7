"""How much of one gradient is signal? Every estimator at the same starting policy, on the same episodes.

python -m benchmarks.algorithms.gradient_noise --rollouts 48 --out benchmarks/results/algorithms/gradient_noise.json

For M independent rollouts, g_i is the gradient with respect to the language model's weights that an algorithm computes
from rollout i, by its own code. Signal-to-noise is ‖E g‖² / tr Cov(g) of one rollout; its inverse is the number of
rollouts whose mean gradient has as much noise as signal. The plug-ins are unbiased: with ḡ the mean gradient,
tr Cov = Σ‖g_i − ḡ‖² / (M − 1) and ‖E g‖² = ‖ḡ‖² − tr Cov / M, which is the mean of ⟨g_i, g_j⟩ over i ≠ j and may come
out negative. Intervals (95 %) are the jackknife's over rollouts: a bootstrap would draw a rollout twice and take its
product with itself for signal.

The cosine between two *mean* gradients as they stand says mostly how much noise they share, so the cosine with plain
REINFORCE is made of products of different rollouts too: ⟨E g, E h⟩ / (‖E g‖ ‖E h‖). It is 1 where an estimator is
unbiased up to scale, can come out above, and isn't defined where a signal comes out negative. (Plain REINFORCE is
itself unbiased up to the division by the tokens of the rollout.)

A critic knows nothing at the start, so those who have one are measured twice: with values of zero (``cold``), and with
the best linear value head that past episodes give (``fitted``). The running mean comes from those past episodes too.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.utils import explained_variance
from transformers import PreTrainedModel

from agents.algorithms.a2c import A2C
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.models.contexts import packed_positions
from agents.models.pretrained import load_causal_lm
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer
from benchmarks.provenance import provenance
from text_env.vector_env import TextVectorEnv, plain

# Of the mean variance of a hidden unit: the best of 0.001 to 10 on held-out episodes is between 0.1 and 0.3.
RIDGE = 0.2
GROUP_SIZE = 4


class Estimator(NamedTuple):
    """
    :param name: of the algorithm in the benchmark's results.
    :param algorithm: its class.
    :param options: of its constructor; the value loss is left out, so that only the policy gradient is measured.
    :param critic: ``"cold"``, ``"fitted"`` or None, for those that use no values.
    """

    name: str
    algorithm: type[OnPolicyAlgorithm]
    options: dict[str, Any] = {}  # noqa: RUF012 (a default of a tuple, which nothing changes)
    critic: str | None = None

    @property
    def key(self) -> str:
        return self.name if self.critic is None else f"{self.name}-{self.critic}"


PLAIN = Estimator("reinforce-no-baseline", REINFORCE, {"baseline": "none"})
ESTIMATORS = (
    PLAIN,
    Estimator("reinforce", REINFORCE, {"baseline": "mean"}),
    Estimator("rloo", RLOO),
    Estimator("grpo", GRPO),
    *(
        Estimator(name, algorithm, {"vf_coef": 0.0, **options}, critic)
        for critic in ("cold", "fitted")
        for name, algorithm, options in (
            ("reinforce-value", REINFORCE, {"baseline": "value"}),
            ("a2c", A2C, {}),
            # Its first minibatch, as long as the ratio is 1.
            ("ppo", PPO, {"batch_size": None, "gae_lambda": 0.95, "gae_lambda_value": None}),
        )
    ),
)


def measure(
    rollouts: int = 48,
    episodes: int = 16,
    past_episodes: int = 512,
    model: Any = "builtin",
    env: TextVectorEnv | None = None,
    estimators: Sequence[Estimator] = ESTIMATORS,
    seed: int = 0,
) -> dict[str, Any]:
    """
    :param rollouts: M.
    :param episodes: of a rollout; a multiple of the environment's ``group_size``.
    :param past_episodes: what critics and running means are fitted to, and nothing is measured on.
    :param model: the starting policy, as for ``CausalLMPolicy``.
    :param env: by default ``TextRLHF-v0`` with four texts of a prompt.
    :param estimators: which.
    :param seed: of the episodes.
    :return: what it was measured on, and ``estimators``: each by its name with the critic's (``"rloo"``,
        ``"ppo-fitted"``), its ``snr`` with ``low`` and ``high``; as ``[estimate, low, high]`` the ``cosine`` and
        ``minus``, by how much its ratio exceeds each other one's on the same rollouts. None is: not defined.
    """
    if rollouts < 3:
        raise ValueError(f"Expected at least 3 rollouts, since the jackknife leaves one of them out, got {rollouts}.")
    start = time.perf_counter()
    if env is None:
        env = plain(gym.make_vec("TextRLHF-v0", num_envs=episodes, group_size=GROUP_SIZE))
    lm = load_causal_lm(model)  # one object for all: the same weights, and nothing here steps them
    env.reset(seed=seed)  # the prompts; the tokens are drawn by PyTorch, which the sampler seeds
    sampler = _algorithm(PLAIN, lm, env, episodes, seed)
    past = _collect(sampler, past_episodes)
    fit_value_head(sampler.policy, past)
    buffers = [_collect(sampler, episodes) for _ in range(rollouts)]  # with the fitted head's values
    scores = np.concatenate([buffer.episode_sums(buffer.rewards) for buffer in buffers])
    values = np.concatenate([buffer.values for buffer in buffers])
    returns = np.concatenate([np.repeat(b.episode_sums(b.rewards), b.lengths) for b in buffers])
    reinforce = gradients(PLAIN, _algorithm(PLAIN, lm, env, episodes), buffers, past)
    plain_signal = signal(reinforce @ reinforce.T)
    rows, snr = {}, {}
    for estimator in estimators:
        own = gradients(estimator, _algorithm(estimator, lm, env, episodes), buffers, past)
        gram = own @ own.T
        snr[estimator.key] = signal_to_noise(gram)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = signal(own @ reinforce.T) / (np.sqrt(signal(gram)) * np.sqrt(plain_signal))
        rows[estimator.key] = {
            "algorithm": estimator.name,
            "critic": estimator.critic,
            **dict(zip(("snr", "low", "high"), interval(snr[estimator.key]) or [None] * 3, strict=True)),
            "cosine": interval(cosine),
        }
        del own  # before the next: two of them are most of the memory
    for key, row in rows.items():
        row["minus"] = {other: interval(snr[key] - snr[other]) for other in rows if other != key}
    return {
        "rollouts": rollouts,
        "episodes_per_rollout": episodes,
        "group_size": env.group_size,
        "past_episodes": past_episodes,
        "parameters": reinforce.shape[1],
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "explained_variance_of_the_fitted_critic": float(explained_variance(values, returns)),
        "seconds": time.perf_counter() - start,
        "estimators": rows,
    }


def _algorithm(
    estimator: Estimator, lm: PreTrainedModel, env: TextVectorEnv, episodes: int, seed: int | None = None
) -> OnPolicyAlgorithm:
    return estimator.algorithm(
        "CausalLMPolicy",
        env,
        n_episodes=episodes,
        policy_kwargs={"model": lm, "separate_critic": False},  # the critic that all of them can have
        seed=seed,
        device="cpu",
        **estimator.options,
    )


def _collect(algorithm: OnPolicyAlgorithm, episodes: int) -> EpisodeBuffer:
    """Whole episodes; no reference, which at the start is the policy itself: the KL is 0."""
    env = algorithm.vector_env
    buffer = EpisodeBuffer(0, env.single_observation_space, env.single_action_space, "cpu", n_envs=env.num_envs)
    collect_episodes(algorithm.policy, env, episodes, buffer)
    buffer.finalize()
    return buffer


@torch.no_grad()
def fit_value_head(policy: CausalLMPolicy, buffer: EpisodeBuffer) -> None:
    """Make the value head the ridge regression of the episodes' scores on hidden states.

    :param policy: whose value head is set.
    :param buffer: episodes.
    """
    buffer.returns = np.repeat(buffer.episode_sums(buffer.rewards), buffer.lengths)
    hidden, targets = [], []
    for part in buffer.batches(np.arange(buffer.n_episodes), 4096):
        samples = buffer.pack(part)
        at = packed_positions(samples.observations)
        hidden.append(policy.lm.hidden_states(samples.observations["input_ids"])[at.row, at.column])
        targets.append(samples.returns)
    x, y = torch.cat(hidden).double(), torch.cat(targets).double()
    centred = x - x.mean(dim=0)
    covariance = centred.T @ centred / len(x)
    penalty = RIDGE * covariance.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(covariance + penalty, centred.T @ (y - y.mean()) / len(x))
    policy.value_head.set(weight, y.mean() - x.mean(dim=0) @ weight)


def gradients(
    estimator: Estimator, algorithm: OnPolicyAlgorithm, buffers: Sequence[EpisodeBuffer], past: EpisodeBuffer
) -> np.ndarray:
    """
    :param estimator: which.
    :param algorithm: its instance.
    :param buffers: M rollouts; left as they are.
    :param past: episodes for what an algorithm remembers of earlier ones.
    :return: float32 [M, P], of its loss with respect to the language model's weights.
    """
    weights = list(algorithm.policy.lm.parameters())
    if algorithm.state_attributes:
        algorithm.estimate(copy.copy(past))
    state = {name: getattr(algorithm, name) for name in algorithm.state_attributes}
    found = np.empty((len(buffers), sum(weight.numel() for weight in weights)), dtype=np.float32)
    for row, buffer in zip(found, buffers, strict=True):
        # Algorithms replace these arrays and change none in place.
        algorithm.buffer = copy.copy(buffer)
        if estimator.critic == "cold":
            algorithm.buffer.values = np.zeros_like(buffer.values)
        for name, value in state.items():  # rollouts are independent: none is another's past
            setattr(algorithm, name, value)
        algorithm.set_advantages(algorithm.buffer)
        algorithm._backward(np.arange(buffer.n_episodes))
        row[:] = torch.cat([weight.grad.flatten() for weight in weights]).numpy()
    return found


# ---- statistics: arrays [1 + M], from all rollouts, then without each of them -------------------------------------


def signal(products: np.ndarray) -> np.ndarray:
    """Unbiased ⟨E g, E h⟩: the mean of ⟨g_i, h_j⟩ over i ≠ j.

    :param products: [M, M], every ⟨g_i, h_j⟩.
    :return: [1 + M].
    """
    products = products.astype(np.float64)
    m, diagonal = len(products), np.diag(products)
    total = products.sum() - diagonal.sum()
    without = total - products.sum(axis=0) - products.sum(axis=1) + 2 * diagonal
    return np.array([total / (m * (m - 1)), *without / ((m - 1) * (m - 2))])


def signal_to_noise(gram: np.ndarray) -> np.ndarray:
    """‖E g‖² / tr Cov(g), where tr Cov(g) = E‖g‖² − ‖E g‖².

    :param gram: [M, M], every ⟨g_i, g_j⟩.
    :return: [1 + M]; NaN if all gradients are 0.
    """
    m, squares = len(gram), np.diag(gram).astype(np.float64)
    mean_square = np.array([squares.mean(), *(squares.sum() - squares) / (m - 1)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return signal(gram) / (mean_square - signal(gram))


def interval(estimates: np.ndarray) -> list[float] | None:
    """
    :param estimates: [1 + M].
    :return: the estimate and its 95 % jackknife interval (Efron & Stein 1981: never too narrow on average), or None if
        it isn't defined on all rollouts or without one of them.
    """
    if not np.isfinite(estimates).all():
        return None
    estimate, without = estimates[0], estimates[1:]
    margin = 1.96 * math.sqrt((len(without) - 1) * without.var())
    return [float(estimate), float(estimate - margin), float(estimate + margin)]


def _cell(found: Sequence[float | None] | None, digits: int) -> str:
    if found is None or None in found:
        return "–"
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*found, d=digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    origin = provenance("benchmarks.algorithms.gradient_noise")
    result = measure(args.rollouts, seed=args.seed)
    table = Table("estimator", "signal / noise", "… minus plain REINFORCE's", "cosine with it")
    for key, row in result["estimators"].items():
        ratio, more = [row[name] for name in ("snr", "low", "high")], row["minus"].get(PLAIN.name)
        table.add_row(key, _cell(ratio, 4), _cell(more, 4), _cell(row["cosine"], 2))
    Console().print(table)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**origin, "seed": args.seed, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
