"""VAPO's ablation on responses of a hundred tokens: what is each part of PPO worth where answers are right or wrong?

    python -m benchmarks.ablation --seeds 5 --workers 2 --out runs/ablation

VAPO (Yue et al. 2025, https://arxiv.org/abs/2504.05118) takes PPO from 5 to 60 on AIME 2024 with seven changes, and
takes each of them away again, one at a time. The same is done here on ``TextArithmetic-v0``. Everything else is the
default of ``agents.PPO``. A run that is finished is not run again: take up where it stopped with the same ``--out``.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.utils import set_random_seed

from agents.algorithms.ppo import PPO
from agents.state.arguments import argument_defaults
from agents.state.schedules import LearningRate
from benchmarks.arithmetic import Curve, mean_and_interval, measure
from benchmarks.many_runs import all_runs, file_of, write_results
from benchmarks.plot_style import STYLE
from text_env.arithmetic import MODEL

GROUP_SIZE = 4
PPO_RATE: float = argument_defaults(PPO)["learning_rate"]

VAPO: dict[str, Any] = {
    "critic_warmup_episodes": 128,
    "gae_lambda_value": 1.0,
    "length_adaptive_alpha": 0.05,
    "clip_range_high": 0.28,
    "loss_weighting": "token",
    "positive_lm_coef": 0.1,
    "positive_score": 1.0,
}
"""VAPO's parts, with its own numbers, besides group sampling."""


class Variant(NamedTuple):
    """VAPO without one of its parts.

    :param changes: the arguments that differ from VAPO's.
    :param group_size: the number of texts of each prompt.
    :param vapo: what VAPO's authors report for it: AIME 2024, mean of 32 samples, in per cent.
    """

    changes: dict[str, Any]
    group_size: int
    vapo: int


NOTHING: dict[str, Any] = {
    "critic_warmup_episodes": 0,
    "gae_lambda_value": None,
    "length_adaptive_alpha": None,
    "clip_range_high": None,
    "loss_weighting": "sequence",
    "positive_lm_coef": 0.0,
}

VARIANTS: dict[str, Variant] = {
    "VAPO": Variant({}, GROUP_SIZE, 60),
    "without value pretraining": Variant({"critic_warmup_episodes": 0}, GROUP_SIZE, 11),
    "without decoupled GAE": Variant({"gae_lambda_value": None}, GROUP_SIZE, 33),
    "without length-adaptive GAE": Variant({"length_adaptive_alpha": None}, GROUP_SIZE, 45),
    "without clip-higher": Variant({"clip_range_high": None}, GROUP_SIZE, 46),
    "without token-level loss": Variant({"loss_weighting": "sequence"}, GROUP_SIZE, 53),
    "without positive-example loss": Variant({"positive_lm_coef": 0.0}, GROUP_SIZE, 54),
    "without group sampling": Variant({}, 1, 55),
    "plain PPO": Variant(NOTHING, 1, 5),
}


@dataclass
class Options:
    """Take each part away from VAPO, on the built-in arithmetic."""

    out: Path
    """Where results.json, table.md and the plot go; the runs themselves go to its folder runs/."""
    seeds: int = 5
    """The number of seeds, from 0."""
    total_timesteps: int = 100_000
    """The number of tokens of a run."""
    episodes: int = 256
    """The number of held-out problems that a run is evaluated on."""
    workers: int = 1
    """The number of runs at a time, of one thread each."""


def run(name: str, seed: int, options: Options) -> dict[str, Any]:
    """Train and evaluate once.

    :param name: a key of ``VARIANTS``.
    :param seed: the seed.
    :param options: the settings of the benchmark.
    :return: the run's row of ``results.json``.
    """
    torch.set_num_threads(1)
    variant = VARIANTS[name]
    env: Any = gym.make_vec("TextArithmetic-v0", num_envs=64, group_size=variant.group_size)
    rate = LearningRate(PPO_RATE, "linear", 0.0)
    kwargs = {**VAPO, **variant.changes}
    model = PPO("CausalLMPolicy", env, learning_rate=rate, seed=seed, policy_kwargs={"model": MODEL}, **kwargs)
    curve, start = Curve(), time.process_time()
    model.learn(options.total_timesteps, callback=curve)
    seconds = time.process_time() - start
    set_random_seed(seed)
    held_out = measure(model, options.episodes, (3, 4))
    return {
        "variant": name,
        "seed": seed,
        "tokens": model.num_timesteps,
        "cpu_seconds": seconds,
        "kl": held_out["kl"],
        "before": held_out["reference"]["correct"],
        "after": held_out["policy"]["correct"],
        "lowest": min(curve.accuracy),
        "mean_length": held_out["policy"]["mean_length"],
        "curve": {"tokens": curve.tokens, "accuracy": curve.accuracy},
    }


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """
    :param rows: the runs.
    :return: the cells of a table: a header, and one row for each variant.
    """
    cells = [["", "VAPO on AIME 2024", "here: right answers", "less than all parts by", "KL", "lowest on the way"]]
    whole = {row["seed"]: row["after"] for row in rows if row["variant"] == "VAPO"}
    for name, variant in VARIANTS.items():
        runs = [row for row in rows if row["variant"] == name]
        if not runs:
            continue
        after = mean_and_interval([row["after"] for row in runs])
        lost = [whole[row["seed"]] - row["after"] for row in runs if row["seed"] in whole]
        cells.append(
            [
                name,
                f"{variant.vapo} %",
                "{:.3f} [{:.3f}, {:.3f}]".format(*after),
                "" if name == "VAPO" or not lost else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*mean_and_interval(lost)),
                f"{np.mean([row['kl'] for row in runs]):.1f}",
                f"{min(row['lowest'] for row in runs):.2f}",
            ]
        )
    return cells


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the share of right answers over tokens: the mean over seeds, a line for each variant.

    :param rows: the runs.
    :param path: the file.
    """
    import matplotlib as mpl
    import matplotlib.figure

    with mpl.rc_context(STYLE):
        figure = mpl.figure.Figure(figsize=(8.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(VARIANTS):
            curves = [row["curve"] for row in rows if row["variant"] == name]
            if not curves:
                continue
            grid = np.linspace(max(c["tokens"][0] for c in curves), min(c["tokens"][-1] for c in curves), 30)
            mean = np.mean([np.interp(grid, c["tokens"], c["accuracy"]) for c in curves], axis=0)
            thick = name in ("VAPO", "plain PPO")
            style = "-" if number < 7 else "--"  # there are fewer colours than variants
            axes.plot(grid, mean, style, color=f"C{number % 7}", linewidth=2.5 if thick else 1.2, label=name)
        axes.set_xlabel("tokens")
        axes.set_ylabel("share of right answers, sampled")
        axes.set_title("Arithmetic in training: VAPO, and without each of its parts")
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:.0f}k")
        figure.legend(loc="outside right center")
        figure.savefig(path, dpi=130)


def report(rows: list[dict[str, Any]], options: Options) -> None:
    """Write ``results.json``, ``table.md`` and the plot, and print the table.

    :param rows: the runs.
    :param options: the settings of the benchmark.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    header, *body = table(rows)
    printed = Table(*header)
    for cells in body:
        printed.add_row(*cells)
    Console().print(f"Held-out arithmetic, {options.total_timesteps:,} tokens, {options.seeds} seeds", printed)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body)]
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    settings = {"vapo": VAPO, "group_size": GROUP_SIZE, "learning_rate": PPO_RATE, "workers": options.workers}
    write_results("benchmarks.ablation", options.out, rows, **settings)
    plot(rows, options.out / "learning_curves.png")


def main(options: Options) -> int:
    """Run what has not been run yet, and report.

    :param options: the settings.
    :return: the exit status, 0.
    """
    todo = {
        file_of(options.out, name, options.total_timesteps, options.episodes, seed): (name, seed, options)
        for seed in range(options.seeds)
        for name in VARIANTS
    }
    rows = all_runs(run, todo, options.workers)
    report(rows, options)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
