"""A report on a reward model, from its margins: accuracy, log-loss, calibration, two plots and a table.

The margin of a pair of texts is the score of the chosen text minus that of the rejected one. Notation: N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table


def describe_margins(margins: NDArray[np.float64]) -> dict[str, Any]:
    """
    :param margins: float64 [N].
    :return: ``pairs``, the number N; ``accuracy``, in which a tie counts half, and ``accuracy_se``, its standard error
        if pairs are independent; ``log_loss``, the mean of −log σ(margin), in nats; ``calibration`` (see
        :func:`calibration_bins`) and ``calibration_error``; ``margin_mean`` and ``margin_std``.
    """
    right = (margins > 0) + 0.5 * (margins == 0)  # float64 [N]
    bins = calibration_bins(margins)
    return {
        "pairs": len(margins),
        "accuracy": float(right.mean()),
        "accuracy_se": float(right.std() / np.sqrt(len(right))),
        "log_loss": float(np.logaddexp(0, -margins).mean()),
        "calibration_error": expected_calibration_error(bins),
        "margin_mean": float(margins.mean()),
        "margin_std": float(margins.std()),
        "calibration": bins,
    }


def calibration_bins(margins: NDArray[np.float64], n_bins: int = 10) -> list[dict[str, float]]:
    """How often the model prefers the chosen text, by its confidence.

    The confidence is σ(|margin|), the probability that the model gives to its own preference, which is at least ½.

    :param margins: float64 [N].
    :param n_bins: the number of bins of equal width from ½ to 1.
    :return: for each bin that holds pairs, ``pairs``, their number, and the means ``confidence`` and ``accuracy`` over
        them.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = (margins > 0) + 0.5 * (margins == 0)
    number = np.minimum(((confidence - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    return [
        {
            "pairs": int((number == i).sum()),
            "confidence": float(confidence[number == i].mean()),
            "accuracy": float(right[number == i].mean()),
        }
        for i in np.unique(number)
    ]


def expected_calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """The mean distance between confidence and accuracy (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    :param bins: what :func:`calibration_bins` returned.
    :return: the mean over pairs, in [0, 1].
    """
    total = sum(b["pairs"] for b in bins)
    return sum(b["pairs"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / total


def plot_calibration(bins: Sequence[dict[str, float]], path: Path) -> None:
    """Plot a reliability diagram, with a standard error for each bin.

    :param bins: what :func:`calibration_bins` returned.
    :param path: the PNG file that is written.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="tab:gray", linestyle="--", label="calibrated")
    x, y, n = (np.array([b[key] for b in bins]) for key in ("confidence", "accuracy", "pairs"))
    error = np.sqrt(y * (1 - y) / n)
    axes.errorbar(x, y, yerr=error, color="tab:blue", marker="o", capsize=3, label="held-out pairs")
    axes.set_xlabel("confidence σ(|margin|)")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", framealpha=0.9)
    figure.savefig(path, dpi=120)


def plot_margins(margins: NDArray[np.float64], path: Path) -> None:
    """Plot a histogram of margins, in which the pairs that the model gets wrong have another colour.

    :param margins: float64 [N].
    :param path: the PNG file that is written.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    edges = margin_edges(margins)
    axes.hist(margins[margins > 0], edges, color="tab:blue", label="right")
    axes.hist(margins[margins <= 0], edges, color="tab:orange", label="wrong")
    axes.set_xlabel("margin: score of the chosen text − score of the rejected one")
    axes.set_ylabel("held-out pairs")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", framealpha=0.9)
    figure.savefig(path, dpi=120)


def margin_edges(margins: NDArray[np.float64]) -> list[float]:
    """
    :param margins: float64 [N].
    :return: the ends of 40 bars that hold all margins. 0 is among them, so no bar mixes right and wrong pairs.
    """
    most = max(float(np.abs(margins).max()), 1e-6)
    up = np.linspace(0, most, 21).tolist()  # ends in `most` itself: 20 times a twentieth of it may be less
    return [*(-end for end in up[:0:-1]), *up]


def report_table(report: dict[str, Any]) -> Table:
    """
    :param report: what :func:`agents.reward_models.train.train_reward_model` returned.
    :return: a table of the most important entries.
    """
    held_out, pairs, normalisation = report["held_out"], report["pairs"], report["normalisation"]
    table = Table("", "", title=f"Reward model on {escape(report['settings']['preferences'])}", show_header=False)
    table.add_row("pairs", f"{pairs['train']} to train, {pairs['held_out']} held out (by: {pairs['split_by']})")
    table.add_row("left out", f"{pairs['malformed']} malformed rows, {pairs['overlong']} overlong pairs")
    table.add_row("held-out accuracy", f"{held_out['accuracy']:.3f} ± {held_out['accuracy_se']:.3f}", style="bold")
    if report["annotator_ceiling"] is not None:
        table.add_row("the annotator's ceiling", f"{report['annotator_ceiling']:.3f}")
    table.add_row(
        "accuracy on training pairs", f"{report['train']['accuracy']:.3f} ± {report['train']['accuracy_se']:.3f}"
    )
    table.add_row("log-loss (chance: 0.693)", f"{held_out['log_loss']:.3f}")
    table.add_row("expected calibration error", f"{held_out['calibration_error']:.3f}")
    table.add_row("margin", f"{held_out['margin_mean']:.2f}, standard deviation {held_out['margin_std']:.2f}")
    if normalisation is not None:
        spread = f"mean {normalisation['mean']:.3f}, standard deviation {normalisation['std']:.3f}"
        table.add_row(
            f"{normalisation['texts']} texts of {escape(normalisation['policy'])}", f"{spread}, normalised to 0 and 1"
        )
    table.add_row("seconds", f"{report['seconds']['all']:.0f}, training {report['seconds']['training']:.0f}")
    return table
