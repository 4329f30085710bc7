"""What the microscope says of a critic, as a table for the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table


def critic_table(result: dict[str, Any]) -> Table:
    """
    :param result: what :func:`agents.evaluation.critic_microscope.examine_critic` returned.
    :return: the figures by position and overall, and below them who orders siblings right.
    """
    table = Table(
        *("position", "states", "value", "return", "bias", "rmse", "explained", "tau"),
        title=f"The critic: {_size(result)}",
        caption=_caption(result),
    )
    for row in result["by_position"]:
        table.add_row(f"{100 * row['position']:.0f}%", *_cells(row))
    table.add_section()
    table.add_row("all", *_cells(result["overall"]), style="bold")
    return table


def _size(result: dict[str, Any]) -> str:
    return f"{result['texts']} texts, {result['positions']} positions, {result['branches']} branches"


def _cells(row: dict[str, Any]) -> list[str]:
    shares = ["–" if row[name] is None else f"{row[name]:.2f}" for name in ("explained_variance", "kendall_tau")]
    means = [f"{row[name]:.2f}" for name in ("mean_value", "mean_outcome")]
    return [str(row["states"]), *means, f"{row['bias']:+.2f}", f"{row['rmse']:.2f}", *shares]


def _caption(result: dict[str, Any]) -> str:
    overall, pairs = result["overall"], result["siblings"]
    worth = overall["worth_branches"]
    worth = "no error that branches could show" if worth is None else f"an error like that of {worth:.1f} branches"
    lines = [f"A value has {worth}. Explained: the share of the true values' variance; tau: of the order."]
    if pairs["decided"]:
        percent = [100 * pairs[name] for name in ("critic", "one_branch", "all_branches")]
        low, high = (100 * end for end in pairs["critic_interval"])
        lines.append(
            f"Siblings ordered right, {pairs['decided']} pairs of {pairs['pairs']} that differ: critic "
            f"{percent[0]:.0f}% [{low:.0f}, {high:.0f}], one branch {percent[1]:.0f}%, {result['branches']} branches "
            f"{percent[2]:.0f}%, chance 50%."
        )
    else:
        lines.append(f"None of {pairs['pairs']} pairs of siblings differ by more than two standard errors.")
    return "\n".join(lines)


def plot_critic(result: dict[str, Any], path: Path, whose: str = "") -> None:
    """Plot the values against what followed, the error and the share explained by position, and who orders siblings
    right.

    :param result: what :func:`agents.evaluation.critic_microscope.examine_critic` returned.
    :param path: the PNG file that is written.
    :param whose: of which run or policy the critic is, for the title.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 6.9), layout="constrained")
    owner = f" of {whose}" if whose else ""
    figure.suptitle(f"The critic{owner}: {_size(result)}", x=0.01, ha="left", parse_math=False)
    panels = figure.subplots(2, 2)
    for axes, draw in zip(panels.flat, (_calibration, _errors, _explained, _siblings), strict=True):
        draw(axes, result)
        axes.grid(color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _calibration(axes: Any, result: dict[str, Any]) -> None:
    states, bins = result["states"], result["calibration"]
    ends = [f([*states["value"], *states["mean_return"]]) for f in (min, max)]
    axes.plot(ends, ends, color="tab:gray", linestyle="--", linewidth=1, label="right")
    axes.scatter(states["value"], states["mean_return"], s=9, color="tab:blue", alpha=0.3, linewidths=0, label="states")
    x, y, error = (np.array([b[name] for b in bins]) for name in ("value", "outcome", "outcome_se"))
    axes.errorbar(x, y, yerr=error, color="tab:orange", marker="o", markersize=4, capsize=2, label="mean of a bin")
    axes.set_title("Calibration", loc="left", fontweight="bold")
    axes.set_xlabel("value")
    axes.set_ylabel(f"mean return of {result['branches']} branches")
    axes.legend(frameon=False, fontsize="small")


def _errors(axes: Any, result: dict[str, Any]) -> None:
    x = _positions(axes, result)
    rows = result["by_position"]
    bias = np.array([row["bias"] for row in rows])
    axes.axhline(0, color="tab:gray", linewidth=1)
    if all(row["bias_interval"] is not None for row in rows):
        low, high = np.array([row["bias_interval"] for row in rows]).T
        axes.fill_between(x, low, high, color="tab:blue", alpha=0.15, linewidth=0)
    axes.plot(x, bias, color="tab:blue", marker="o", markersize=4, label="bias (band: 95 %)")
    axes.plot(x, [row["rmse"] for row in rows], color="tab:orange", marker="o", markersize=4, label="rmse of the value")
    label = "rmse of one branch"
    axes.plot(x, [row["branch_rmse"] for row in rows], color="tab:green", linestyle="--", label=label)
    axes.set_title("Error", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize="small")


def _explained(axes: Any, result: dict[str, Any]) -> None:
    x = np.array(_positions(axes, result))
    names = ("explained_variance", "kendall_tau")
    lines = np.array([[row[name] for row in result["by_position"]] for name in names], dtype=np.float64)
    lowest = lines[np.isfinite(lines)].min(initial=0.0)
    axes.set_ylim(max(-1.1, lowest - 0.05), 1.05)
    looks = (("variance explained", "tab:blue"), ("rank agreement τ", "tab:orange"))
    for shares, (label, colour) in zip(lines, looks, strict=True):
        # A critic that misleads may be far below 0, and would leave the rest no room: such a point is an arrow.
        outside = shares < -1.05
        axes.plot(x, np.where(outside, np.nan, shares), color=colour, marker="o", markersize=4, label=label)
        axes.plot(x[outside], np.full(outside.sum(), -1.04), color=colour, marker="v", linestyle="none")
        for position, share in zip(x[outside], shares[outside], strict=True):
            beside: Any = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": "small"}
            axes.annotate(f"{share:.1f}".replace("-", "−"), (position, -1.04), color=colour, **beside)
    axes.axhline(0, color="tab:gray", linewidth=1)
    axes.set_title("How much it knows (1: all)", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize="small")


def _siblings(axes: Any, result: dict[str, Any]) -> None:
    pairs = result["siblings"]
    names = {
        "critic": "critic",
        "one_branch": "1 branch",
        "all_branches": f"{result['branches']} branches",
    }
    axes.set_title("Siblings ordered right", loc="left", fontweight="bold")
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"share of {pairs['decided']} pairs that differ")
    axes.axhline(0.5, color="tab:gray", linestyle="--", linewidth=1, zorder=3)
    if not pairs["decided"]:
        return
    shares = [pairs[name] for name in names]
    axes.bar(list(names.values()), shares, color=["tab:blue", "tab:green", "tab:green"], width=0.6)
    for number, share in enumerate(shares):  # at the foot, where the interval doesn't cross it
        axes.text(number, 0.04, f"{share:.0%}", ha="center", color="black" if share < 0.15 else "white")
    low, high = pairs["critic_interval"]
    axes.vlines(0, low, high, color="black", linewidth=1.5, zorder=4)


def _positions(axes: Any, result: dict[str, Any]) -> list[float]:
    axes.set_xlabel("position (share of the text)")
    return [row["position"] for row in result["by_position"]]
