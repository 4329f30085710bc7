"""Does PPO learn the built-in task with right answers, beside A2C, REINFORCE, RLOO and GRPO at equal tokens?

    python -m benchmarks.arithmetic --algorithms ppo --seeds 1 --threads 2 --out runs/arithmetic    # `make arithmetic`
    python -m benchmarks.arithmetic --seeds 10 --workers 2 --out benchmarks/results/arithmetic      # all of it: hours

Every run trains ``builtin:arithmetic`` on ``TextArithmetic-v0``, and is then evaluated on held-out problems, and on
held-out problems that are one step longer than any in training. ``control`` is PPO with a verifier that answers at
random. A run that is finished is not run again: take up where it stopped with the same ``--out``.

Notation: R runs of one algorithm, one a seed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.evaluation.evaluate import evaluate
from agents.evaluation.intervals import student_t
from agents.policies.causal_lm_policy import load_policy
from agents.runs.algorithms import ALGORITHMS
from agents.runs.curves import TOKENS, colour, dashes, line_of
from agents.state.schedules import LearningRate
from benchmarks.many_runs import all_runs, file_of, write_results
from benchmarks.plot_style import STYLE
from text_env.arithmetic import MODEL

Name = Literal["ppo", "a2c", "reinforce", "rloo", "grpo", "control"]
NAMES: tuple[Name, ...] = ("ppo", "a2c", "reinforce", "rloo", "grpo", "control")

SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"n_episodes": 128, "batch_size": 32, "n_epochs": 1, "learning_rate": 5e-4},
    "a2c": {"n_episodes": 32, "learning_rate": 5e-4},
    "reinforce": {"n_episodes": 32, "learning_rate": 5e-4},
    "rloo": {"n_episodes": 32, "learning_rate": 5e-4},
    "grpo": {"n_episodes": 32, "learning_rate": 5e-4},
}
"""What each algorithm is given besides its defaults: all make a step of 32 episodes at the same learning rate."""

MEASURES = ("accuracy_before", "accuracy_after", "greedy_before", "greedy_after", "longer_before", "longer_after")


@dataclass
class Options:
    """Train on the built-in arithmetic, and measure how often the answer is right."""

    out: Path
    """Where results.json, table.md and the plots go; the runs themselves go to its folder runs/."""
    algorithms: tuple[Name, ...] = NAMES
    seeds: int = 10
    """The number of seeds, from 0."""
    total_timesteps: int = 250_000
    """The number of tokens of a run."""
    episodes: int = 256
    """The number of held-out problems that a run is evaluated on, and of longer ones."""
    workers: int = 1
    """The number of runs at a time."""
    threads: int = 1
    """The number of threads of a run."""


class Curve(BaseCallback):
    """Remembers the share of right answers of each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self.accuracy: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.tokens.append(self.num_timesteps)
        self.accuracy.append(float(np.mean([episode["correct"] for episode in self.locals["episodes"]])))


def answers_at_random(completions: Sequence[Any], **_: Any) -> list[float]:
    """A verifier that does not look at the answer.

    :param completions: the texts, of which only the number matters.
    :return: 1 or 0 for each, with equal probability.
    """
    return np.random.randint(0, 2, len(completions)).astype(float).tolist()


def train(name: Name, seed: int, total_timesteps: int) -> tuple[OnPolicyAlgorithm, Curve]:
    """
    :param name: the algorithm; ``"control"`` is PPO with a verifier that answers at random.
    :param seed: the seed of everything.
    :param total_timesteps: the number of tokens.
    :return: the trained algorithm, and the share of right answers on its way.
    """
    algorithm = "ppo" if name == "control" else name
    settings = dict(SETTINGS[algorithm])
    rate = LearningRate(settings.pop("learning_rate"), "linear", 0.0)
    env: Any = "TextArithmetic-v0"
    if name == "control":
        metrics = {"correct": "correct(extract='hash')"}
        env = gym.make_vec(env, num_envs=64, reward=answers_at_random, metrics=metrics)
    model = ALGORITHMS[algorithm](
        "CausalLMPolicy", env, learning_rate=rate, seed=seed, policy_kwargs={"model": MODEL}, **settings
    )
    curve = Curve()
    model.learn(total_timesteps, callback=curve)
    return model, curve


def run(name: Name, seed: int, options: Options) -> dict[str, Any]:
    """Train and evaluate once.

    :param name: the algorithm.
    :param seed: the seed.
    :param options: the settings of the benchmark.
    :return: the run's row of ``results.json``.
    """
    torch.set_num_threads(options.threads)
    start, cpu_start = time.perf_counter(), time.process_time()
    model, curve = train(name, seed, options.total_timesteps)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    set_random_seed(seed)
    held_out = measure(model, options.episodes, (3, 4))
    longer = measure(model, options.episodes, (5,))
    before, after = held_out["reference"], held_out["policy"]
    return {
        "algorithm": name,
        "seed": seed,
        "tokens": model.num_timesteps,
        "seconds": seconds,  # of training; longer where something else ran beside it, unlike those of its processors
        "cpu_seconds": cpu_seconds,
        "kl": held_out["kl"],
        "kl_longer": longer["kl"],
        "accuracy_before": before["correct"],
        "accuracy_after": after["correct"],
        "greedy_before": held_out["answers"]["reference"]["greedy_accuracy"],
        "greedy_after": held_out["answers"]["policy"]["greedy_accuracy"],
        "longer_before": longer["reference"]["correct"],
        "longer_after": longer["policy"]["correct"],
        "longer_greedy_after": longer["answers"]["policy"]["greedy_accuracy"],
        "well_formed": after["well_formed"],
        "mean_length": after["mean_length"],
        "curve": {"tokens": curve.tokens, "accuracy": curve.accuracy},
    }


def measure(model: OnPolicyAlgorithm, episodes: int, n_steps: tuple[int, ...]) -> dict[str, Any]:
    """
    :param model: a trained algorithm.
    :param episodes: the number of problems.
    :param n_steps: how many operations they have.
    :return: what :func:`agents.evaluation.evaluate.evaluate` returns, with the policy before training as reference.
    """
    kwargs = {"split": "eval", "n_steps": n_steps}
    env: Any = gym.make_vec("TextArithmetic-v0", num_envs=64, task_kwargs=kwargs)
    # A policy is made for one size of observations, so the trained one is taken over with its weights.
    policy, reference = (load_policy(MODEL, env, "cpu", "float32", 1.0) for _ in range(2))
    policy.lm.load_state_dict(model.policy.lm.state_dict())
    return evaluate(policy, reference, env, episodes)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """
    :param values: one of each run, [R].
    :return: their mean, and the 95 % interval of the mean over seeds, by Student's t; no width for a single run.
    """
    array = np.array(values)
    half = student_t(len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else 0.0
    return float(array.mean()), float(array.mean() - half), float(array.mean() + half)


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """
    :param rows: the runs.
    :return: the cells of a table: a header, and one row for each algorithm.
    """
    measures = [name.replace("_", " ") for name in MEASURES]
    cells = [["algorithm", "runs", "gain, sampled", *measures, "KL (nats)", "length", "CPU minutes"]]
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        runs = [row for row in rows if row["algorithm"] == name]
        gain = mean_and_interval([row["accuracy_after"] - row["accuracy_before"] for row in runs])
        shares = [mean_and_interval([row[measure] for row in runs]) for measure in MEASURES]
        measured = [gain, *np.clip(shares, 0.0, 1.0)]
        kl, length = (np.mean([row[key] for row in runs]) for key in ("kl", "mean_length"))
        minutes = np.mean([row["cpu_seconds"] for row in runs]) / 60
        figures = [f"{mean:.3f}" + f" [{low:.3f}, {high:.3f}]" * (len(runs) > 1) for mean, low, high in measured]
        cells.append([name, str(len(runs)), *figures, f"{kl:.2f}", f"{length:.0f}", f"{minutes:.1f}"])
    return cells


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the share of right answers over tokens, a line for each algorithm and a band around it for its seeds.

    :param rows: the runs.
    :param path: the file.
    """
    import matplotlib as mpl
    import matplotlib.figure

    with mpl.rc_context(STYLE):
        figure = mpl.figure.Figure(figsize=(8.5, 4.6), layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(dict.fromkeys(row["algorithm"] for row in rows)):
            runs = [row["curve"] for row in rows if row["algorithm"] == name]
            line = line_of([(np.array(run["tokens"]), np.array(run["accuracy"])) for run in runs], number, name)
            assert line is not None
            look = {"color": colour(number), "linestyle": dashes(number)}
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x / 1000, line.low, line.high, color=look["color"], alpha=0.15, linewidth=0)
            axes.plot(line.x / 1000, line.y, linewidth=2.2, label=f"{name} ({len(runs)})", **look)
        axes.set_ylim(0, 1)
        axes.set_xlabel(TOKENS)
        axes.set_ylabel("share of right answers, sampled")
        axes.set_title("Arithmetic, in training")
        title = "mean, smoothed;\nband: all seeds"
        figure.legend(loc="outside right center", title=title, alignment="left", title_fontsize=9.5)
        figure.savefig(path, dpi=130)


def report(rows: list[dict[str, Any]], options: Options) -> None:
    """Write ``results.json``, ``table.md`` and the plot, and print the table.

    :param rows: the runs.
    :param options: the settings of the benchmark.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    header, *body = table(rows)
    # A column for each algorithm, since a terminal is rarely wide enough for one of each measure.
    printed = Table()
    for name in (header[0], *(cells[0] for cells in body)):
        printed.add_column(name)
    for cells in list(zip(header, *body, strict=True))[1:]:
        printed.add_row(*(cell.replace(" [", "\n[") for cell in cells))
    title = f"Held-out arithmetic, {options.total_timesteps:,} tokens, {options.episodes} problems"
    Console().print(title, printed, sep="\n")
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body)]
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    write_results(
        "benchmarks.arithmetic", options.out, rows, settings=SETTINGS, threads=options.threads, workers=options.workers
    )
    plot(rows, options.out / "learning_curves.png")


def main(options: Options) -> int:
    """Run what has not been run yet, and report.

    :param options: the settings.
    :return: the exit status: 0 if every run of PPO reached 0.9 greedily and 0.85 by sampling, else 1.
    """
    todo = {
        file_of(options.out, name, options.total_timesteps, options.episodes, seed): (name, seed, options)
        for seed in range(options.seeds)
        for name in options.algorithms
    }
    rows = all_runs(run, todo, options.workers)
    rows.sort(key=lambda row: (NAMES.index(row["algorithm"]), row["seed"]))
    report(rows, options)
    reached = [
        row["greedy_after"] >= 0.9 and row["accuracy_after"] >= 0.85 for row in rows if row["algorithm"] == "ppo"
    ]
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
