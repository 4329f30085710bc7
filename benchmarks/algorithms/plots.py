"""The four plots of the benchmark. One colour an algorithm, whoever wrote it; the marker says who did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agents.runs.curves import dashes
from benchmarks.algorithms.sentences import (
    SMOOTHING,
    Estimate,
    Run,
    bootstrap,
    has_likelihood,
    iqm,
    iqm_curve,
    probability_of_improvement,
    smoothed_curve,
    target_score,
    untrained,
)
from benchmarks.plot_style import STYLE

# Okabe and Ito's colours, which colour-blind readers tell apart (https://jfly.uni-koeln.de/color/), less the yellow,
# and an indigo.
COLOURS = {
    "ppo": "#0072B2",
    "ppo-two-thirds": "#332288",
    "ppo-reward-critic": "#332288",
    "ppo-value-head": "#999933",
    "a2c": "#E69F00",
    "reinforce": "#009E73",
    "reinforce-no-baseline": "#D55E00",
    "reinforce-value": "#CC79A7",
    "rloo": "#56B4E9",
    "grpo": "#000000",
    "ddpg": "#D55E00",
    "td3": "#CC79A7",
}
FAMILIES = {"own": "This project", "sb3-": "Stable-Baselines3", "trl-": "TRL"}
MARKERS = {"own": "o", "sb3-": "s", "trl-": "^"}
WITH_CRITIC = ("ppo", "a2c", "reinforce-value")  # what the names of these begin with
GRID = 60  # points of a learning curve

Runs = dict[str, list[Run]]


def family(name: str) -> str:
    """Whose implementation: a key of ``FAMILIES``."""
    return name[:4] if name[:4] in FAMILIES else "own"


def colour(name: str) -> str:
    """Of an algorithm, the same in every implementation; grey for one that isn't known."""
    return COLOURS.get(name.removeprefix("sb3-").removeprefix("trl-"), "#7F7F7F")


def in_families(runs: Runs) -> dict[str, list[str]]:
    """Family → its algorithms, families without any left out."""
    grouped = {key: [name for name in runs if family(name) == key] for key in FAMILIES}
    return {key: names for key, names in grouped.items() if names}


def write_plots(runs: Runs, directory: Path) -> None:
    """
    :param runs: algorithm → its runs.
    :param directory: gets the PNG files.
    """
    with plt.rc_context(STYLE):
        for name, draw in {
            "learning_curves": learning_curves,
            "score_kl": score_against_kl,
            "seeds": seeds,
            "probability_of_improvement": improvement,
        }.items():
            figure = draw(runs)
            figure.savefig(directory / f"{name}.png", dpi=130, bbox_inches="tight")
            plt.close(figure)


def learning_curves(runs: Runs) -> Figure:
    """Score over tokens, a panel for each family; our PPO in all of them, to compare with."""
    grouped = in_families(runs)
    figure, axes = plt.subplots(1, len(grouped), figsize=(5.2 * len(grouped), 4.6), sharey=True, squeeze=False)
    target = target_score(runs)
    for axis, (key, names) in zip(axes[0], grouped.items(), strict=True):
        axis.axhline(target, color="#999999", linewidth=1, linestyle=":", zorder=1)
        axis.annotate(
            "80 % of the best gain", (0.01, target), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", color="#777777", fontsize=8.5,
        )  # fmt: skip
        if key != "own" and "ppo" in runs:
            x, middle, _, _ = curve_of(runs["ppo"])
            axis.plot(x, middle, color="#888888", linewidth=1.6, linestyle="--", label="ppo (own)")
        for number, name in enumerate(names):
            x, middle, low, high = curve_of(runs[name])
            axis.fill_between(x, low, high, color=colour(name), alpha=0.16, linewidth=0)
            axis.plot(x, middle, color=colour(name), linewidth=2, linestyle=dashes(number), label=name)
        axis.set_title(FAMILIES[key])
        axis.set_xlabel("training tokens (thousands)")
        axis.margins(x=0)
        axis.set_xlim(left=0)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9.5, handlelength=3.2)
    axes[0][0].set_ylabel("training score (IQM, 95 % band)")
    return figure


def curve_of(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    :return: tokens in thousands, IQM, lower and upper bound, ``[GRID]`` each, as far as all runs have the mean of
        ``SMOOTHING`` bins. Nearer to the end it is of fewer, and in the last bin are but the few texts that ended
        after the budget, which are the longest.
    """
    curves = [smoothed_curve(run) for run in runs]
    ends = [tokens[-1 - SMOOTHING // 2] if len(tokens) > SMOOTHING else tokens[-1] for tokens, _ in curves]
    x = np.linspace(0, min(ends), GRID)
    return x / 1000, *iqm_curve(np.array([np.interp(x, tokens, scores) for tokens, scores in curves]))


def in_panels(runs: Runs) -> dict[str, list[str]]:
    """Title of a panel of :func:`score_against_kl` → its algorithms, of which no more than a handful fit into one."""
    panels: dict[str, list[str]] = {}
    for key, names in in_families(runs).items():
        for name in names:
            title = FAMILIES[key]
            if key == "own":
                title += ", with a critic" if name.startswith(WITH_CRITIC) else ", without a critic"
            panels.setdefault(title, []).append(name)
    return panels


def score_against_kl(runs: Runs) -> Figure:
    """What was gained, and how far the policy went for it: a panel for a handful of algorithms, the others in grey."""
    known = {name: ran for name, ran in runs.items() if has_likelihood(ran)}
    panels = in_panels(known)
    columns = 2 if len(panels) == 4 else max(1, min(3, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure, grid = plt.subplots(
        rows, columns, figsize=(5.3 * columns, 4.3 * rows + 0.4), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    points = {name: [[run[key] for run in ran] for key in ("kl", "score")] for name, ran in known.items()}
    middles = {name: [bootstrap(iqm, values) for values in both] for name, both in points.items()}
    for axis, (title, names) in zip(grid.flat, panels.items(), strict=False):
        for name, (x, y) in middles.items():
            if name not in names:
                axis.plot(x.value, y.value, "o", markersize=5, color="#C4C4C4", zorder=2)
        for name in names:
            x, y = middles[name]
            style: Any = {"color": colour(name), "marker": MARKERS[family(name)]}
            axis.scatter(*points[name], s=22, alpha=0.35, linewidths=0, **style)
            axis.errorbar(x.value, y.value, xerr=bar(x), yerr=bar(y), color=colour(name), elinewidth=1.8, zorder=3)
            axis.plot(
                x.value, y.value, markersize=10, markeredgecolor="white", linestyle="none", zorder=4,
                label=f"{name} ({len(known[name])})", **style,
            )  # fmt: skip
        axis.set_title(title, fontsize=11)
        axis.legend(loc="lower right", fontsize=9, title="IQM, 95 % (seeds)", title_fontsize=9, alignment="left")
    for axis in list(grid.flat)[len(panels) :]:
        axis.set_axis_off()
    for axis in list(grid.flat)[max(0, len(panels) - columns) : len(panels)]:
        axis.tick_params(labelbottom=True)  # those without a panel below
    # Below the lowest point there is room for the legend, to the right of which nothing lies.
    if scores := [score for _, ran in points.values() for score in ran]:
        spread = max(scores) - min(scores) or 1.0
        grid[0][0].set_ylim(min(scores) - 0.35 * spread, max(scores) + 0.06 * spread)
    others = "Grey: the algorithms of the other panels. " if len(panels) > 1 else ""
    start = f"Outside of the picture, the untrained model scores {untrained(runs)['score']:.2f} at a KL of 0."
    figure.supxlabel(f"KL to the reference (nats per episode)\n\n{others}{start}", fontsize=10.5)
    figure.supylabel("score on held-out prompts", fontsize=10.5)
    title = "Score against KL: up and left is better"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    return figure


def seeds(runs: Runs) -> Figure:
    """Every seed as a dot."""
    rows = [name for names in in_families(runs).values() for name in names]
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.4))
    # Dots stand above their interval, spread a little (always in the same way), so that equal ones can be told apart.
    jitter = np.random.default_rng(0)
    for y, name in enumerate(rows):
        scores = [run["score"] for run in runs[name]]
        heights = y - 0.2 + jitter.uniform(-0.1, 0.1, len(scores))
        axis.scatter(scores, heights, s=22, alpha=0.55, linewidths=0, color=colour(name), marker=MARKERS[family(name)])
        whisker(axis, y + 0.15, bootstrap(iqm, scores), name)
    start = untrained(runs)["score"]
    axis.axvline(start, color="#777777", linewidth=1, linestyle=":")
    axis.annotate("untrained language model", (start, -0.8), xytext=(4, 0), textcoords="offset points", fontsize=8.5,
                  color="#777777", va="center")  # fmt: skip
    label_rows(axis, rows)
    axis.set_xlabel("score on held-out prompts: seeds, IQM with 95 % interval")
    return figure


def improvement(runs: Runs) -> Figure:
    """How surely a run of our PPO scores above a run of another algorithm."""
    rows = [name for names in in_families(runs).values() for name in names if name != "ppo"]
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.4))
    axis.axvline(0.5, color="#777777", linewidth=1, linestyle=":")
    ours = [run["score"] for run in runs.get("ppo", [])]
    for y, name in enumerate(rows if ours else []):
        whisker(axis, y, probability_of_improvement(ours, [run["score"] for run in runs[name]]), name)
    axis.set_xlim(-0.03, 1.03)
    label_rows(axis, [f"PPO over {name}" for name in rows])
    axis.set_xlabel("probability that a run of our PPO has the higher score (95 % interval)")
    return figure


def bar(estimate: Estimate) -> np.ndarray:
    """Lengths below and above, ``[2, 1]``; none for a single run."""
    lengths = np.array([[estimate.value - estimate.low], [estimate.high - estimate.value]])
    return np.where(np.isfinite(lengths), np.maximum(lengths, 0.0), 0.0)


def whisker(axis: Axes, y: float, estimate: Estimate, name: str) -> None:
    """An estimate with its interval, at a height."""
    axis.errorbar(
        estimate.value, y, xerr=bar(estimate), color=colour(name), marker=MARKERS[family(name)], markersize=9,
        markeredgecolor="white", elinewidth=2.6, capsize=0, zorder=3,
    )  # fmt: skip


def label_rows(axis: Axes, rows: Sequence[str]) -> None:
    """From top to bottom."""
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.4, -1.0)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
