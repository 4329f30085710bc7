"""How many seeds, and how many rollouts, decide what is undecided? A power calculation from the spreads that are known.

    python -m benchmarks.algorithms.power benchmarks/results/algorithms

Each question is asked of a directory of results with the spreads found there: with how many seeds would the bootstrap
interval of a difference between two standard deviations leave 0 out in four experiments of five, and after how many
rollouts would the jackknife's interval of a difference between two gradients' signal-to-noise ratios? Final scores are
drawn from normal distributions. Choose the number before the runs; a verdict comes from new runs, not from this.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.algorithms.sentences import spread

POWER = 0.8
SEEDS = (5, 7, 10, 15, 20, 30, 50, 100)
EXPERIMENTS = 400
RESAMPLES = 400


@dataclass
class Options:
    """Say how many seeds and rollouts would decide."""

    results: Annotated[Path, tyro.conf.Positional]
    """A directory that `benchmarks.algorithms` wrote."""
    beside: str = "ppo"
    """The algorithm that the others are compared with."""


def chance_of_a_verdict(spreads: tuple[float, float], seeds: int, generator: np.random.Generator) -> float:
    """
    :param spreads: the true standard deviations of two algorithms' final scores.
    :param seeds: the number of runs of each.
    :param generator: of the experiments.
    :return: the share of experiments whose 95 % percentile bootstrap of the difference leaves 0 out.
    """
    resampled = []
    for scale in spreads:
        scores = generator.normal(scale=scale, size=(EXPERIMENTS, 1, seeds))
        drawn = generator.integers(seeds, size=(EXPERIMENTS, RESAMPLES, seeds))
        resampled.append(np.take_along_axis(np.broadcast_to(scores, drawn.shape), drawn, axis=2).std(axis=2, ddof=1))
    low, high = np.percentile(resampled[0] - resampled[1], [2.5, 97.5], axis=1)
    return float(((low > 0) | (high < 0)).mean())


def seeds_needed(spreads: tuple[float, float], power: float = POWER, seed: int = 0) -> int | None:
    """
    :param spreads: the true standard deviations of two algorithms' final scores.
    :param power: the chance of a verdict that is asked for.
    :param seed: of the experiments.
    :return: the smallest number of :data:`SEEDS` that has it, None if none has.
    """
    generator = np.random.default_rng(seed)
    return next((n for n in SEEDS if chance_of_a_verdict(spreads, n, generator) >= power), None)


def rollouts_needed(difference: tuple[float, float, float], rollouts: int, power: float = POWER) -> int:
    """
    :param difference: the value and the bounds of its 95 % interval.
    :param rollouts: the number of rollouts that it was measured with.
    :param power: the chance of a verdict that is asked for.
    :return: the number of rollouts that has it if the value is the true one: the interval shrinks with the root of it.
    """
    value, low, high = difference
    error = (high - low) / 2 / NormalDist().inv_cdf(0.975)
    wanted = abs(value) / (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(power))
    return math.ceil(rollouts * (error / wanted) ** 2)


def questions(results: Path, beside: str) -> list[dict[str, Any]]:
    """
    :param results: a directory that ``benchmarks.algorithms`` wrote.
    :param beside: the algorithm that the others are compared with.
    :return: for each comparison what is compared, what is known of it, and how many seeds or rollouts it has and needs.
    """
    scores: dict[str, list[float]] = {}
    for run in json.loads((results / "results.json").read_text()):
        scores.setdefault(run["algorithm"], []).append(run["score"])
    found = []
    for name in scores:
        if name != beside and min(len(scores[name]), len(scores[beside])) > 2:
            spreads = spread(scores[name]), spread(scores[beside])
            found.append(
                {
                    "what": f"spread of {name} and of {beside}",
                    "known": f"{spreads[0]:.3f} and {spreads[1]:.3f}",
                    "has": f"{len(scores[name])} and {len(scores[beside])} seeds",
                    "needs": seeds_needed(spreads),
                }
            )
    noise = json.loads((results / "gradient_noise.json").read_text())
    for critic in ("cold", "fitted"):
        for name, difference in noise["estimators"].get(f"{beside}-{critic}", {}).get("minus", {}).items():
            if name.startswith("reinforce") and difference is not None and "-value" not in name:
                value, low, high = difference
                found.append(
                    {
                        "what": f"gradient signal-to-noise of {beside} ({critic} critic) − of {name}",
                        "known": f"{value:+.4f} [{low:+.4f}, {high:+.4f}]",
                        "has": f"{noise['rollouts']} rollouts",
                        "needs": rollouts_needed((value, low, high), noise["rollouts"]),
                    }
                )
    return found


def main(arguments: list[str] | None = None) -> None:
    """
    :param arguments: of the command line; by default the process's.
    """
    options = tyro.cli(Options, args=arguments, description=__doc__)
    table = Table("what is compared", "known", "has", f"needs, for {POWER:.0%}")
    for question in questions(options.results, options.beside):
        needs = question["needs"]
        table.add_row(question["what"], question["known"], question["has"], str(needs or f"more than {SEEDS[-1]}"))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
