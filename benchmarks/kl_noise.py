"""How noisy the KL divergence and its gradient are, by one sample of a token and by the sum over the vocabulary.

python -m benchmarks.kl_noise --json FILE

A policy is trained for a while, so that it is away from its reference. Then the same rollouts are given to the
estimator k1 and to the exact divergence. Measured are the spread over rollouts of the divergence itself, and the noise
of the gradient of the language model's weights, the trace of its covariance over rollouts: of the divergence alone (no
score, no critic), and of the whole of PPO at several prices β. A ratio below 1 says that the exact divergence is less
noisy.

``agreement`` is M ‖d̄‖² / tr Cov(d) of the difference d of the two gradients in M rollouts: about 1 where both have the
same mean.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.algorithms.ppo import PPO
from agents.objectives.kl import KLEstimator
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer
from benchmarks.provenance import provenance

ESTIMATORS: tuple[KLEstimator, ...] = ("k1", "exact")


class Spread:
    """Mean and covariance's trace of vectors, of which only sums are kept."""

    def __init__(self) -> None:
        self.n, self._sum, self._squares = 0, torch.zeros(()), 0.0

    def add(self, vector: torch.Tensor) -> None:
        """
        :param vector: float64 [P].
        """
        self.n += 1
        self._sum = self._sum + vector
        self._squares += float(vector.square().sum())

    @property
    def square_of_mean(self) -> float:
        """‖ḡ‖²."""
        return float((self._sum / self.n).square().sum())

    @property
    def noise(self) -> float:
        """tr Cov."""
        return (self._squares - self.n * self.square_of_mean) / (self.n - 1)


def measure(
    tokens: int = 10_000,
    rollouts: int = 24,
    episodes: int = 16,
    coefs: Sequence[float] = (0.04, 0.4),
    env: Any = "TextRLHF-v0",
    seed: int = 0,
    **kwargs: Any,
) -> dict[str, Any]:
    """
    :param tokens: how long the policy is trained before.
    :param rollouts: M, at least 2.
    :param episodes: of a rollout.
    :param coefs: prices β.
    :param env: as for ``PPO``.
    :param seed: of everything.
    :param kwargs: further arguments of ``PPO``.
    :return: the figures, as the module explains them.
    """
    ppo = PPO("CausalLMPolicy", env, n_episodes=32, seed=seed, device="cpu", **kwargs).learn(tokens)
    ppo.vf_coef, ppo.normalize_advantage = 0.0, False  # the policy's gradient, in units of the score
    gae_lambda = ppo.gae_lambda
    cases = [("divergence alone", 1.0), *((f"PPO, β = {coef:g}", coef) for coef in coefs)]
    divergence: dict[str, list[float]] = {estimator: [] for estimator in ESTIMATORS}
    spreads = {name: {key: Spread() for key in (*ESTIMATORS, "difference")} for name, _ in cases}
    for _ in range(rollouts):
        env = ppo.vector_env
        sampled = EpisodeBuffer(0, env.single_observation_space, env.single_action_space, "cpu", n_envs=env.num_envs)
        scores = [episode["score"] for episode in collect_episodes(ppo.policy, env, episodes, sampled)]
        for name, coef in cases:
            gradients = {}
            for estimator in ESTIMATORS:
                buffer = copy.deepcopy(sampled)
                ppo.kl_estimator, ppo.kl_coef, ppo.gae_lambda = estimator, coef, gae_lambda
                ppo._tell(buffer)
                buffer.finalize(ppo.policy)
                if name == "divergence alone":
                    ppo.gae_lambda = 1.0
                    buffer.values[:] = 0
                    buffer.rewards[buffer.starts[1:] - 1] -= np.array(scores, dtype=np.float32)
                    kl = buffer.log_ratio if buffer.exact_kl is None else buffer.exact_kl
                    divergence[estimator].append(float(buffer.episode_sums(kl).mean()))
                ppo.buffer = buffer
                ppo.set_advantages(buffer)
                ppo._backward(np.arange(episodes))
                weights = [p.grad.flatten() for p in ppo.policy.lm.parameters() if p.grad is not None]
                gradients[estimator] = torch.cat(weights).double()
                spreads[name][estimator].add(gradients[estimator])
            spreads[name]["difference"].add(gradients["exact"] - gradients["k1"])
    return {
        "tokens": tokens,
        "rollouts": rollouts,
        "episodes_per_rollout": episodes,
        "divergence": {
            key: {"mean": float(np.mean(x)), "std": float(np.std(x, ddof=1))} for key, x in divergence.items()
        },
        "gradient": {
            name: {
                "noise": {key: spread[key].noise for key in ESTIMATORS},
                "ratio": spread["exact"].noise / spread["k1"].noise,
                "agreement": rollouts * spread["difference"].square_of_mean / spread["difference"].noise,
            }
            for name, spread in spreads.items()
        },
    }


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--rollouts", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    origin = provenance("benchmarks.kl_noise", args)
    figures = measure(options.tokens, options.rollouts, seed=options.seed)
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    if options.json is not None:
        options.json.write_text(json.dumps({**origin, "figures": figures}, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
