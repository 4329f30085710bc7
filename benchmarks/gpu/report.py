"""The report as tables, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.table import Table

Figures = dict[str, dict[str, Any]]


class Rows(NamedTuple):
    """A table.

    :param title: its heading.
    :param columns: their headings.
    :param rows: the cells.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(*self.columns, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a page."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        cells = (
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
        )
        return f"## {self.title}\n\n" + "\n".join(cells) + "\n"


def number(value: float | None, digits: int = 3) -> str:
    """A number with some digits, or a dash."""
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def median(of: dict[str, Any], digits: int = 3) -> str:
    """A median and its range, as ``record.spread`` gives them."""
    low, high = number(of["low"], digits), number(of["high"], digits)
    return number(of["median"], digits) + (f" ({low}–{high})" if low != high else "")


def gibibytes(value: float | None) -> str:
    """Bytes in GiB."""
    return "–" if value is None else f"{value / 2**30:.2f}"


def trouble(figure: dict[str, Any]) -> str | None:
    """What went wrong with a figure, in one line; None if nothing did."""
    said = figure.get("error") or figure.get("skipped")
    return str(said).strip().splitlines()[-1][:110] if said else None


def troubles(found: dict[str, Any]) -> list[str]:
    """
    :param found: a part of the report.
    :return: what failed in it or was left out, each in one line; nothing if it ran to its end.
    """
    said = [str(found["error"])] if "error" in found else []
    if "skipped" in found:
        said.append(f"no time for {len(found['skipped'])} of its stages")
    figures = found.get("figures", {})
    without = [name for name, figure in figures.items() if trouble(figure) or figure.get("passed") is False]
    return [*said, f"failed or left out: {', '.join(without)}"] if without else said


def _rows(
    title: str, columns: tuple[str, ...], figures: Figures, cells: Callable[[dict[str, Any]], tuple[str, ...]]
) -> Rows:
    rows = []
    for name, figure in figures.items():
        wrong = trouble(figure)
        filled = (wrong,) if wrong is not None else cells(figure)
        rows.append((name, *filled, *[""] * (len(columns) - 1 - len(filled))))
    return Rows(title, columns, rows)


def _tests(figures: Figures) -> Rows:
    return _rows(
        "Tests on the device",
        ("", "passed", "pytest says"),
        figures,
        lambda figure: ("yes" if figure["passed"] else "NO", figure["summary"]),
    )


def _precision(figures: Figures) -> Rows:
    def cells(figure: dict[str, Any]) -> tuple[str, ...]:
        ratio = figure["first_ratio"]
        return (
            number(figure["mean"]),
            number(figure["p99"]),
            number(figure["largest"]),
            f"{number(ratio['lowest'], 6)} – {number(ratio['highest'], 6)}",
            number(100 * ratio["outside_clip_range"]),
        )

    title = "Numbers: |Δ log π| from the CPU in float32, and PPO's ratios before any update"
    return _rows(title, ("", "mean |Δ log π|", "99 %", "largest", "first ratios", "% outside 1 ± 0.2"), figures, cells)


def _determinism(figures: Figures) -> Rows:
    def cells(figure: dict[str, Any]) -> tuple[str, ...]:
        same = (("yes" if figure[name] else "no") for name in ("same_weights", "same_texts"))
        return *same, number(figure["largest_difference"])

    title = "The same seed twice, three iterations of PPO"
    return _rows(title, ("", "same weights", "same texts", "largest difference of a weight"), figures, cells)


def _throughput(figures: Figures) -> Rows:
    def cells(figure: dict[str, Any]) -> tuple[str, ...]:
        ratios = figure.get("ratios", {})
        return (
            median(figure["tokens_per_second"]) if figure["rounds"] else "–",
            "; ".join(f"{name} {median(of)}" for name, of in ratios.items() if "generate" in name),
            number(figure["first_seconds"]),
            gibibytes(figure["peak_bytes"]),
            str(figure["rounds"]),
        )

    columns = ("", "tokens/s", "ratios of the same rounds", "first run, s", "peak GiB", "rounds")
    return _rows("Rollouts", columns, figures, cells)


def _profile(figures: Figures) -> Rows:
    def cells(figure: dict[str, Any]) -> tuple[str, ...]:
        share = figure["device_busy_share"]
        return (
            number(1000 * figure["seconds"] / figure["steps"]),
            number(share),
            *(number(figure[f"{what}_per_step"], 4) for what in ("operators", *counted)),
        )

    counted = ("launches", "graphs", "copies", "waits", "cudnn_attention")
    columns = ("", "ms", "device busy", "operators", "launches", "graphs", "copies", "waits", "cuDNN attention")
    title = "One step, counted by the profiler: a token of every row, or a step of the optimiser"
    return _rows(title, columns, figures, cells)


def _ppo(figures: Figures) -> Rows:
    def cells(figure: dict[str, Any]) -> tuple[str, ...]:
        if "time" in figure:
            return (median(figure["time"]),)
        parts = figure.get("parts", {})
        ratio = figure.get("TRL ÷ ours")
        return (
            median(figure["seconds"]) + ("" if ratio is None else f"; ÷ ours {median(ratio)}"),
            *(median(parts[name]) if name in parts else "" for name in ("rollout", "reward", "reference", "update")),
            median(figure["tokens_per_second"]) if parts else "",
            gibibytes(figure.get("peak_bytes")),
        )

    columns = ("", "seconds", "rollout", "reward", "reference", "update", "tokens/s", "peak GiB")
    return _rows("One iteration of PPO", columns, figures, cells)


def _demo(figures: Figures) -> Rows:
    def cells(figure: dict[str, Any]) -> tuple[str, ...]:
        return (
            number(figure["training_seconds"]),
            number(figure["seconds"]),
            f"{figure['before']:.2f} → {figure['after']:.2f}",
            f"{figure['kl']:.1f}",
            "yes" if figure["learned"] else "no",
        )

    columns = ("", "training, s", "everything, s", "score", "KL, nats", "all claims hold")
    return _rows("`textrlhf demo`", columns, figures, cells)


TABLES: dict[str, Callable[[Figures], Rows]] = {
    "tests": _tests,
    "precision": _precision,
    "determinism": _determinism,
    "throughput": _throughput,
    "profile": _profile,
    "ppo": _ppo,
    "demo": _demo,
}


def tables(report: dict[str, Any]) -> Iterator[Rows]:
    """
    :param report: what ``python -m benchmarks.gpu`` wrote.
    :return: a table for each part, and one of the parts' times.
    """
    for part, found in report["parts"].items():
        if found.get("figures"):
            yield TABLES[part](found["figures"])
    rows = []
    for part, found in report["parts"].items():
        rows.append((part, number(found["seconds"]), ("; ".join(troubles(found)) or "to its end")[:110]))
    yield Rows("Parts", ("", "seconds", "ran"), rows)


def as_markdown(report: dict[str, Any]) -> str:
    """
    :param report: what ``python -m benchmarks.gpu`` wrote.
    :return: a page.
    """
    names = ("torch", "transformers", "stable-baselines3", "gymnasium")
    software = ", ".join(f"{name} {report['versions'][name]}" for name in names)
    cuda = f", CUDA {report['cuda']}, driver {report['driver']}" if report["cuda"] else ""
    options = report["options"]
    sizes = f"prompt {options['prompt']}, response {options['response']}"
    head = (
        f"# {report['device']}\n\n{report['date']}, commit {report['commit']}, {report.get('minutes', 0):.1f} minutes: "
        f"`{report['command']}`\n\n{software}{cuda}. Models {', '.join(options['models'])}; {sizes} tokens, "
        "bfloat16 on CUDA and float32 elsewhere. Medians, with the range in brackets.\n"
    )
    return "\n".join([head, *(table.markdown() for table in tables(report))])
