"""A run in the terminal, while it is running: curves as sparklines, and the latest texts."""

from __future__ import annotations

import contextlib
import time

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agents.runs.curves import METRICS, PART, in_groups, metric_of, thinned
from agents.runs.look_commands import WatchConfig
from agents.runs.run_files import RunFiles, read_run, times
from text_env.rendering import printable, two_parts

LEVELS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # of a sparkline, in characters, where the terminal has them
BESIDE = 66  # the characters that what stands beside a sparkline takes


def watch(config: WatchConfig, console: Console) -> None:
    """Show a run, and show it anew until it has ended or somebody presses Ctrl-C.

    :param config: the options.
    :param console: the terminal.
    :raises FileNotFoundError: if it is no run.
    :raises ValueError: if its files are not what a run writes.
    """
    run = read_run(config.run)
    width = max(8, min(WIDTH, console.width - BESIDE))
    if config.once:
        console.print(view(run, config.texts, width))
        return
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(view(run, config.texts, width), console=console, auto_refresh=False) as live,
    ):
        while run.running:
            time.sleep(config.every)
            run = read_run(config.run)
            live.update(view(run, config.texts, width), refresh=True)


def view(run: RunFiles, n_texts: int, width: int = WIDTH) -> RenderableType:
    """
    :param run: a run.
    :param n_texts: the number of texts that are shown.
    :param width: of a sparkline, in characters.
    :return: what the terminal shows of it.
    """
    facts = " · ".join(str(run.config.get(name)) for name in ("algo", "model") if run.config.get(name) is not None)
    head = Text.assemble((printable(run.name), "bold"), f"  {printable(facts)}  ", (run.status + _left(run), "cyan"))
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(4):
        table.add_column(no_wrap=True)
    shown = [name for name in run.curves if name in METRICS or name.startswith(PART)]
    for name in (name for names in in_groups(shown).values() for name in names):
        metric, (_, values) = metric_of(name), run.curve(name)
        ends = f"{values[0]:z.3g} → {values[-1]:z.3g}"
        table.add_row(
            Text(printable(metric.title)), Text(sparkline(values, width), "cyan"), Text(ends), Text(metric.unit, "dim")
        )
    parts: list[RenderableType] = [head, table if shown else Text("No iteration has been finished yet.", "dim")]
    last = max(times(run.samples), default=0)  # once: there may be many rows
    latest = [row for row in run.samples if row["timesteps"] == last][:n_texts]
    for row in latest:
        score = row.get("score")
        number = f"{score:+.2f}" if isinstance(score, int | float) else "–"
        text = Text.assemble((number + " ", "cyan"), two_parts(row["prompt"], row["completion"]))
        parts += [Text(f"after {row['timesteps']:,} tokens", "dim"), text] if row is latest[0] else [text]
    return Group(*parts)


def sparkline(values: np.ndarray, width: int = WIDTH) -> str:
    """
    :param values: at least one number, all of them finite.
    :param width: the number of characters at most; where there are more numbers, each stands for the mean of several.
    :return: a character for each number, from the lowest to the highest.
    """
    values = thinned(values, width)
    low, high = float(values.min()), float(values.max())
    share = (values - low) / (high - low) if high - low > 1e-9 * max(abs(low), abs(high)) else np.zeros(len(values))
    return "".join(LEVELS[level] for level in np.minimum(share * len(LEVELS), len(LEVELS) - 1).astype(int))


def _left(run: RunFiles) -> str:
    _, speeds = run.curve("time/fps")
    left = run.total_timesteps - run.timesteps
    if not run.running or not len(speeds) or speeds[-1] <= 0 or left <= 0:
        return ""
    seconds = left / speeds[-1]
    return f", {speeds[-1]:,.0f} tokens/s, " + (
        f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"
    )
