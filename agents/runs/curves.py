"""Curves over the tokens of a training: what each metric is called, in which unit, and how it is drawn."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart (https://jfly.uni-koeln.de/color/), less the yellow,
# which white paper swallows. A dash pattern tells lines apart without any colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
TOKENS = "tokens (thousands)"
MOST_POINTS, MOST_HINTS = 400, 40  # of a line: those that are drawn, and those that say their numbers

SCORES, DISTANCE, TEXTS, UPDATE, REST = (
    *("What is wanted", "How far the policy went", "The texts", "The update", "Everything else that was logged"),
)


@dataclass(frozen=True)
class Metric:
    """A column of ``progress.csv``.

    :param title: what it is.
    :param unit: in which unit, for the axis.
    :param group: the heading that it stands under.
    """

    title: str
    unit: str
    group: str


METRICS = {
    "objective/scores": Metric("Score (trained on)", "score", SCORES),
    "objective/gold_score": Metric("Gold score (only measured)", "score", SCORES),
    "objective/correct": Metric("Accuracy: right answers", "share of texts", SCORES),
    "objective/rlhf_reward": Metric("Score less KL penalty", "score", SCORES),
    "objective/scores_std": Metric("Spread of the score", "standard deviation", SCORES),
    "objective/kl": Metric("KL to the reference", "nats per episode", DISTANCE),
    "objective/kl_coef": Metric("β, the price of the KL", "score per nat", DISTANCE),
    "train/approx_kl": Metric("KL of one update", "nats per token", DISTANCE),
    "train/clip_fraction": Metric("Clip fraction", "share of tokens", DISTANCE),
    "objective/entropy": Metric("Entropy", "nats per token", TEXTS),
    "completions/mean_length": Metric("Length", "tokens per text", TEXTS),
    "completions/clipped_ratio": Metric("Cut off by the budget", "share of texts", TEXTS),
    "train/explained_variance": Metric("Explained variance", "share", UPDATE),
    "train/value_loss": Metric("Value loss", "squared score", UPDATE),
    "train/policy_gradient_loss": Metric("Policy loss", "loss per token", UPDATE),
    "train/grad_norm": Metric("Norm of the gradient", "loss per weight", UPDATE),
    "train/learning_rate": Metric("Learning rate", "per step", UPDATE),
    "time/tokens_per_second": Metric("Speed of the rollouts", "tokens per second", UPDATE),
}
PART = "objective/reward/"  # what the columns of the parts of a sum begin with


def metric_of(column: str) -> Metric:
    """
    :param column: the name of a column.
    :return: what it is; for one that is not known, its name is all there is to say.
    """
    if column.startswith(PART):
        return Metric(f"Part of the reward: {column.removeprefix(PART)}", "score", SCORES)
    short = column.rpartition("/")[2].replace("_", " ")
    return METRICS.get(column) or Metric(column, short if len(short) <= 28 else "as logged", REST)


def in_groups(columns: Sequence[str]) -> dict[str, list[str]]:
    """
    :param columns: names of columns.
    :return: for each heading its columns, the known ones first and in their order, then the others by name.
    """
    known = [*METRICS]
    parts = [name for name in sorted(columns) if name.startswith(PART)]
    order = [*known[:2], *parts, *known[2:]]
    ranked = sorted(columns, key=lambda name: (order.index(name) if name in order else len(order), name))
    groups: dict[str, list[str]] = {heading: [] for heading in (SCORES, DISTANCE, TEXTS, UPDATE, REST)}
    for name in ranked:
        groups[metric_of(name).group].append(name)
    return {heading: names for heading, names in groups.items() if names}


def smoothed(values: np.ndarray) -> np.ndarray:
    """
    :param values: a number for each iteration, [I].
    :return: the mean of each and its neighbours, a fifteenth of them all, or three where that is less, [I]. At the ends
        there are fewer neighbours, as many on either side. Fewer than a dozen numbers are left as they are.
    """
    most = max(len(values) // 30, int(len(values) >= 12))  # neighbours on either side
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(most, np.minimum(at, len(values) - 1 - at))
    means: np.ndarray = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
    return means


def thinned(values: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """
    :param values: numbers in order, [I].
    :param most: the number of points that are wanted.
    :return: the means of neighbours, at most so many.
    """
    if len(values) <= most:
        return values
    starts = np.linspace(0, len(values), most, endpoint=False).astype(int)
    means: np.ndarray = np.add.reduceat(values, starts) / np.diff([*starts, len(values)])
    return means


@dataclass(frozen=True)
class Line:
    """A line of a panel.

    :param x: tokens, [P].
    :param y: numbers, [P].
    :param number: of the line among all of the report, from which it has its colour and its dashes.
    :param label: what it is called where its points say their numbers.
    :param low: the lower end of a band around it, [P]; None: there is none.
    :param high: the upper end.
    :param faint: the line before it was smoothed, [P]; None: it is the line itself.
    """

    x: np.ndarray
    y: np.ndarray
    number: int
    label: str
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    faint: np.ndarray | None = None


def line_of(curves: Sequence[tuple[np.ndarray, np.ndarray]], number: int, label: str) -> Line | None:
    """
    :param curves: tokens and numbers of each of S seeds.
    :param number: as for :class:`Line`.
    :param label: as for :class:`Line`.
    :return: of one seed, the smoothed line; of several, their mean, with a band from the lowest to the highest, for the
        tokens that all of them have. None if there is nothing to draw.
    """
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return None
    if len(curves) == 1:
        [(x, y)] = curves
        smooth = smoothed(y)
        x, y, smooth = thinned(x), thinned(y), thinned(smooth)
        return Line(x, smooth, number, label, faint=None if np.array_equal(y, smooth) else y)
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(first, max(first, last), min(MOST_POINTS, max(len(x) for x, _ in curves)))
    seeds = np.array([np.interp(grid, x, smoothed(y)) for x, y in curves])  # [S, P]
    return Line(grid, seeds.mean(axis=0), number, label, seeds.min(axis=0), seeds.max(axis=0))


def dashes(number: int) -> Any:
    """
    :param number: of a line.
    :return: its dash pattern, as matplotlib takes it: that of its turn through the colours, one further.
    """
    return DASHES[(number + number // len(COLOURS)) % len(DASHES)]


def dash_array(number: int) -> str:
    """
    :param number: of a line.
    :return: its dash pattern, as SVG takes it for a line twice as wide as one.
    """
    pattern = dashes(number)
    return "none" if pattern == "solid" else " ".join(f"{2 * length:g}" for length in pattern[1])


def colour(number: int) -> str:
    """
    :param number: of a line.
    :return: its colour.
    """
    return COLOURS[number % len(COLOURS)]


def draw(axes: Axes, line: Line, unit: str) -> None:
    """
    :param axes: where the line is drawn, over thousands of tokens.
    :param line: the line.
    :param unit: of its numbers, which every few points say when one points at them.
    """
    style: Any = {"color": colour(line.number), "solid_capstyle": "round"}
    x, name = line.x / 1000, f"line-{line.number}"
    if line.low is not None and line.high is not None:
        axes.fill_between(x, line.low, line.high, color=style["color"], alpha=0.18, linewidth=0, gid=name)
    if line.faint is not None:
        axes.plot(x, line.faint, linewidth=0.8, alpha=0.35, gid=name, **style)
    axes.plot(x, line.y, linewidth=1.8, linestyle=dashes(line.number), gid=name, **style)
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_HINTS)).astype(int))
    points = axes.plot(
        x[chosen], line.y[chosen], linestyle="none", marker="o", markersize=7, alpha=0.0 if len(x) > 1 else 1.0,
        color=style["color"], gid=f"{name} points",
    )  # fmt: skip
    points[0].hints = [  # type: ignore[attr-defined]
        f"{line.label}: {line.y[i]:.4g} {unit}, after {line.x[i]:,.0f} tokens" for i in chosen
    ]


@contextmanager
def panel(name: str, x_label: str, y_label: str, width: float = 3.5, height: float = 2.35) -> Iterator[Panel]:
    """
    :param name: of the panel, unique in its page.
    :param x_label: the label of the horizontal axis, with its unit.
    :param y_label: that of the vertical axis.
    :param width: in inches of 96 pixels.
    :param height: likewise.
    :return: a panel to draw in, whose ``svg`` is there once the block is left.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 8.5,
        "axes.grid": True,
        "grid.color": "#E5E5E5",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.xmargin": 0.02,
        "grid.linewidth": 0.7,
        "axes.edgecolor": "#555555",
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height))
        # The same margins for all, so that panels stand in line. Matplotlib's own layouts take twice the time.
        left, right, bottom, top = 0.62 / width, 1 - 0.08 / width, 0.45 / height, 1 - 0.18 / height
        made = Panel(figure.add_axes((left, bottom, right - left, top - bottom)))
        yield made
        made.axes.set_xlabel(x_label)
        made.axes.set_ylabel(y_label)
        made.axes.yaxis.set_label_coords(-0.5 / (width * (right - left)), 0.5)
        made.axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
        low, high = made.axes.get_ylim()
        if high - low < 1e-3 * abs(low + high):  # nothing but rounding
            middle = (low + high) / 2
            made.axes.set_ylim(middle - 0.1 * abs(middle), middle + 0.1 * abs(middle))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        hints = {line.get_gid(): getattr(line, "hints", []) for line in made.axes.get_lines()}
        made.svg = _embeddable(file.getvalue(), f"{y_label} over {x_label}. {made.told}".strip(), hints)


@dataclass
class Panel:
    """A panel that is being drawn.

    :param axes: where.
    :param told: what it shows, for those who don't see it; for them it is named by its axes besides.
    :param svg: the finished picture, an element of HTML.
    """

    axes: Axes
    told: str = ""
    svg: str = ""


SVG = "http://www.w3.org/2000/svg"


def _embeddable(text: str, label: str, hints: dict[Any, list[str]]) -> str:
    """A picture as an element of a page with others: only what is referred to keeps its id, and lines get classes."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(text)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text))
    for element in root.iter():
        gid = element.get("id")
        if gid is None or gid in used:
            continue
        del element.attrib["id"]
        if gid.startswith("line-"):
            element.set("class", gid)
        for use, hint in zip(list(element.iter(f"{{{SVG}}}use")), hints.get(gid, []), strict=False):
            ElementTree.SubElement(use, f"{{{SVG}}}title").text = hint
    for name in ("width", "height"):
        del root.attrib[name]
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")
