"""Does PPO with its defaults ever end below its start? Learning rate, value head and KL penalty are varied to see.

    python -m benchmarks.robustness --out runs/robustness --workers 2      # goes on where it stopped

The grid (:data:`FACTORS`), stated before any run:

- learning rate: 1/√10, 1 and √10 times the central one, so a factor of 10 from lowest to highest, constant;
- scale of the value head (:class:`agents.models.critic.ScaledHead`): 3, 10 and 30;
- KL coefficient: 0, 0.04 and 0.2.

The central learning rate is PPO's default on the sentiment task and on arithmetic with two operations. There, one
factor is varied at a time, and the corners of learning rate × KL coefficient are added. The probes have all 27 settings
with two seeds; their random model of width 32 learns nothing at the default, so their centre is the learning rate at
which tests ask that they be solved (:data:`TASKS`). No run stops early. All else is as PPO's signature has it.

A run ends *below its start* if its score is lower than before training by more than two standard errors of the
difference, or if training raised ``FloatingPointError``. By chance alone, at most one run in 44 that learned nothing
would: both scores are of the same prompts, which can only make their difference vary less than is assumed.
Finished runs are kept in the folder runs/, each with its commit; delete it when PPO has changed.
"""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.evaluation.evaluate import measure_policy
from agents.models.critic import ScaledHead
from agents.models.reference import Reference
from benchmarks.many_runs import all_runs, write_results
from benchmarks.models import tiny_gpt2
from benchmarks.plot_style import STYLE
from text_env.arithmetic import MODEL
from text_env.probes import PROBES, VOCABULARY, make_probe

ROWS = 64
EVALUATION_SEED = 12_345
DEFAULT_RATE = float(inspect.signature(PPO).parameters["learning_rate"].default)
DEFAULT_SCALE = ScaledHead.SCALE
DEFAULT_KL = float(inspect.signature(OnPolicyAlgorithm).parameters["kl_coef"].default)

FACTORS: dict[str, tuple[float, ...]] = {
    "learning_rate": (10**-0.5, 1.0, 10**0.5),  # times the task's central one
    "head_scale": (3.0, 10.0, 30.0),
    "kl_coef": (0.0, 0.04, 0.2),
}
"""The values of each factor; the defaults are among them."""


class Task(NamedTuple):
    """What is trained on.

    :param tokens: the number of tokens of a run.
    :param learning_rate: the central one.
    :param seeds: the number of seeds; None: as many as the options say.
    """

    tokens: int
    learning_rate: float = DEFAULT_RATE
    seeds: int | None = None


TASKS = {
    "sentiment": Task(27_000),
    "arithmetic": Task(60_000),
    "fixed-token": Task(8_000, 1e-2 / 8**0.5, 2),
    "increasing-numbers": Task(24_000, 6e-3 / 8**0.5, 2),
    "count-to-eos": Task(16_000, 6e-3 / 8**0.5, 2),
    "copy-prompt": Task(16_000, 3e-3 / 8**0.5, 2),
    "early-credit": Task(12_000, 6e-3 / 8**0.5, 2),
}
"""The tasks; tokens and learning rates of the probes are those of ``tests/algorithms/test_probes_learned.py``."""


class Setting(NamedTuple):
    """One run."""

    task: str
    learning_rate: float
    head_scale: float
    kl_coef: float
    seed: int


@dataclass
class Options:
    """Train PPO all over the grid, and see whether it ends below its start."""

    out: Path
    """Where results.json, environment.json and robustness.png go; the runs themselves go to its folder runs/."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """The tasks, some of sentiment, arithmetic and the probes."""
    seeds: int = 1
    """The number of seeds of the two large tasks, from 0."""
    tokens: int | None = None
    """The number of tokens of a run; None: as each task has it."""
    episodes: int = 256
    """The number of texts before and after training."""
    workers: int = 1
    """The number of runs at a time, each with one thread."""


def grid(task: str, seeds: int) -> list[Setting]:
    """
    :param task: a name in :data:`TASKS`.
    :param seeds: the number of seeds of a large task.
    :return: its runs.
    """
    cells = itertools.product(*FACTORS.values())
    if task not in PROBES:
        rates, _, coefs = FACTORS.values()
        default = (1.0, DEFAULT_SCALE, DEFAULT_KL)
        corner_rates, corner_coefs = (rates[0], rates[-1]), (coefs[0], coefs[-1])

        def kept(cell: tuple[float, ...]) -> bool:
            corner = cell[0] in corner_rates and cell[1] == DEFAULT_SCALE and cell[2] in corner_coefs
            return corner or sum(a != b for a, b in zip(cell, default, strict=True)) <= 1

        cells = filter(kept, cells)  # type: ignore[assignment]
    centre = TASKS[task].learning_rate
    numbers = range(TASKS[task].seeds or seeds)
    return [Setting(task, centre * rate, scale, kl, seed) for rate, scale, kl in cells for seed in numbers]


def environment(task: str, held_out: bool) -> Any:
    """
    :param task: a name in :data:`TASKS`.
    :param held_out: whether for evaluation, on prompts or problems that are not trained on; a probe has no others.
    :return: the environment, of 64 rows.
    """
    if task in PROBES:
        return make_probe(task, ROWS)
    if task == "arithmetic":
        kwargs = {"n_steps": (2,), **({"split": "eval"} if held_out else {})}
        return gym.make_vec("TextArithmetic-v0", num_envs=ROWS, task_kwargs=kwargs)
    prompts = {"prompts": "builtin:eval"} if held_out else {}
    return gym.make_vec("TextRLHF-v0", num_envs=ROWS, max_prompt_tokens=16, **prompts)


class Means(BaseCallback):
    """Remembers the mean score of each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.scores.append(float(np.mean([episode["score"] for episode in self.locals["episodes"]])))


def tokens_of(setting: Setting, options: Options) -> int:
    """
    :param setting: the run.
    :param options: the settings of the benchmark.
    :return: the number of tokens of the run.
    """
    return options.tokens or TASKS[setting.task].tokens


def file_of(setting: Setting, options: Options) -> Path:
    """
    :param setting: the run.
    :param options: the settings of the benchmark.
    :return: the file that the run's row is kept in.
    """
    task, rate, scale, kl_coef, seed = setting
    size = f"{tokens_of(setting, options)}-{options.episodes}"
    return options.out / "runs" / f"{task}-{size}-lr{rate:.3g}-head{scale:g}-kl{kl_coef:g}-{seed}.json"


def run(setting: Setting, options: Options) -> dict[str, Any]:
    """Measure, train and measure again.

    :param setting: the run.
    :param options: the settings of the benchmark.
    :return: the run's row of ``results.json``.
    """
    torch.set_num_threads(1)
    previous, ScaledHead.SCALE = ScaledHead.SCALE, setting.head_scale
    try:
        return {**setting._asdict(), **train(setting, tokens_of(setting, options), options.episodes)}
    finally:
        ScaledHead.SCALE = previous


def train(setting: Setting, tokens: int, episodes: int) -> dict[str, Any]:
    """
    :param setting: the run; the scale of the value head is set already.
    :param tokens: the number of tokens.
    :param episodes: the number of texts that are measured.
    :return: mean and standard error of the score before and after (None if it failed), KL, the lowest mean score of a
        rollout, and what failed.
    """
    task, rate, _, kl_coef, seed = setting
    model_of = {"sentiment": {}, "arithmetic": {"model": MODEL}}
    kwargs: dict[str, Any] = model_of[task] if task in model_of else {"model": tiny_gpt2(len(VOCABULARY), seed)}
    model = PPO(
        "CausalLMPolicy",
        environment(task, held_out=False),
        learning_rate=rate,
        kl_coef=kl_coef,
        seed=seed,
        device="cpu",
        policy_kwargs=kwargs,
    )
    env = environment(task, held_out=True).unwrapped
    reference = Reference.of(model.policy)
    unit = PROBES[task].optimal_score if task in PROBES else 1.0

    def measure() -> tuple[float, float, float]:
        set_random_seed(EVALUATION_SEED)
        env.reset(seed=EVALUATION_SEED)
        figures = measure_policy(model.policy, reference, env, episodes)
        return figures["score"] / unit, figures["score_std"] / unit / math.sqrt(episodes), figures["kl"]

    before, before_error, _ = measure()
    set_random_seed(seed)  # what the evaluation drew is forgotten
    means = Means()
    after = after_error = kl = error = None
    try:
        model.learn(tokens, callback=means)
        after, after_error, kl = measure()
    except FloatingPointError as failure:
        error = str(failure)
    lowest = min(means.scores, default=math.nan) / unit
    return {
        "before": before,
        "before_error": before_error,
        "after": after,
        "after_error": after_error,
        "kl": kl,
        "lowest": lowest,
        "tokens": model.num_timesteps,
        "error": error,
    }


def is_lower(row: dict[str, Any]) -> bool:
    """
    :param row: a run.
    :return: whether its score is lower than before training, by however little, or it failed.
    """
    return row["after"] is None or row["after"] < row["before"]


def is_below(row: dict[str, Any]) -> bool:
    """
    :param row: a run.
    :return: whether its score is lower by more than two standard errors of the difference, or it failed.
    """
    return row["after"] is None or row["before"] - row["after"] > 2 * error_of(row)


def error_of(row: dict[str, Any]) -> float:
    """
    :param row: a run that did not fail.
    :return: the standard error of after − before if the two are independent, which is the most: they share prompts.
    """
    return math.hypot(row["before_error"], row["after_error"])


def table(rows: list[dict[str, Any]]) -> Table:
    """
    :param rows: the runs.
    :return: a line for each task, and one for each run that is lower than at its start.
    """
    printed = Table(title="PPO's score before and after, over the grid")
    for name in ("task", "runs", "before", "gain", "lowest rollout", "KL (nats)", "lower", "below its start"):
        printed.add_column(name)
    for task in dict.fromkeys(row["task"] for row in rows):
        runs = [row for row in rows if row["task"] == task]
        gains = [row["after"] - row["before"] for row in runs if row["after"] is not None] or [math.nan]
        kls = [row["kl"] for row in runs if row["kl"] is not None] or [math.nan]
        printed.add_row(
            task,
            str(len(runs)),
            f"{np.mean([row['before'] for row in runs]):.3f}",
            f"{min(gains):+.3f} to {max(gains):+.3f}",
            f"{min(row['lowest'] for row in runs):.3f}",
            f"{min(kls):.2f} to {max(kls):.2f}",
            str(sum(map(is_lower, runs))),
            str(sum(map(is_below, runs))),
        )
    for row in filter(is_lower, rows):
        figures = (
            ("failed", "")
            if row["after"] is None
            else (
                f"{row['after'] - row['before']:+.3f} ± {2 * error_of(row):.3f}",
                "" if row["kl"] is None else f"{row['kl']:.2f}",
            )
        )
        name = f"{row['task']}: lr {row['learning_rate']:.2g}, head {row['head_scale']:g}, β {row['kl_coef']:g}"
        below = "yes" if is_below(row) else "no"
        cells = (f"{row['before']:.3f}", figures[0], f"{row['lowest']:.3f}", figures[1], "yes", below)
        printed.add_row(name, f"seed {row['seed']}", *cells)
    return printed


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the gain over the learning rate, a panel for each task; a run that failed is a cross on the line at 0.

    :param rows: the runs.
    :param path: the file.
    """
    import matplotlib as mpl
    import matplotlib.figure
    from matplotlib.lines import Line2D

    colours = dict(zip(FACTORS["kl_coef"], ("#0072B2", "#E69F00", "#CC79A7"), strict=True))  # Okabe and Ito's
    markers = dict(zip(FACTORS["head_scale"], ("o", "s", "^"), strict=True))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(4, len(tasks) + 1)
    with mpl.rc_context(STYLE):
        size = (3.6 * columns, 3.4 * math.ceil((len(tasks) + 1) / columns))
        figure = mpl.figure.Figure(figsize=size, layout="constrained")
        panels = figure.subplots(math.ceil((len(tasks) + 1) / columns), columns, squeeze=False).ravel()
        for axes, task in zip(panels, tasks, strict=False):
            axes.axhline(0, color="black", linewidth=1)
            for row in (row for row in rows if row["task"] == task):
                # Beside each other: at one learning rate, 18 runs would cover one another.
                place = FACTORS["kl_coef"].index(row["kl_coef"]) * 3 + FACTORS["head_scale"].index(row["head_scale"])
                x = row["learning_rate"] * 10 ** ((place - 4) * 0.04 + row["seed"] * 0.015)
                colour = colours[row["kl_coef"]]
                if row["after"] is None:
                    axes.plot(x, 0, "x", color=colour, markersize=8)
                    continue
                bar = 1.96 * error_of(row)
                style = {"fmt": markers[row["head_scale"]], "color": colour, "markersize": 4, "elinewidth": 0.8}
                axes.errorbar(x, row["after"] - row["before"], yerr=bar, **style)
            axes.set_xscale("log")
            ticks = [TASKS[task].learning_rate * factor for factor in FACTORS["learning_rate"]]
            axes.set_xticks(ticks, [f"{tick:.1e}".replace("e-0", "e-") for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.set_xlim(ticks[0] / 1.8, ticks[-1] * 1.8)
            axes.set_title(task)
            axes.set_xlabel("learning rate")
            unit = {"sentiment": "score", "arithmetic": "share right"}.get(task, "share of optimum")
            axes.set_ylabel(f"gain ({unit})")
        for axes in panels[len(tasks) :]:
            axes.set_axis_off()
        handles = [Line2D([], [], color=c, linewidth=3, label=f"KL coefficient {k:g}") for k, c in colours.items()]
        dots = [("0.3", m, f"value head × {s:g}") for s, m in markers.items()] + [("0.3", "x", "failed")]
        handles += [Line2D([], [], color=c, marker=m, linestyle="", label=label) for c, m, label in dots]
        legend = panels[len(tasks)].legend(handles=handles, loc="center", title="bars: 95 %")
        legend.set_in_layout(False)
        figure.savefig(path, dpi=130)


def main(options: Options) -> int:
    """Run what has not been run yet, and report.

    :param options: the settings.
    :return: the exit status: 0 if no run ended below its start, else 1.
    :raises ValueError: for an unknown task.
    """
    if unknown := set(options.tasks) - set(TASKS):
        raise ValueError(f"Expected tasks to be some of {list(TASKS)}, got {sorted(unknown)}.")
    todo = {
        file_of(setting, options): (setting, options) for task in options.tasks for setting in grid(task, options.seeds)
    }
    rows = all_runs(run, todo, options.workers)
    tasks = {name: TASKS[name]._asdict() for name in options.tasks}
    write_results(
        "benchmarks.robustness",
        options.out,
        rows,
        factors=FACTORS,
        tasks=tasks,
        options={**asdict(options), "out": str(options.out)},
    )
    plot(rows, options.out / "robustness.png")
    Console(width=140).print(table(rows))  # in fewer columns, names and figures are cut short
    return int(any(map(is_below, rows)))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
