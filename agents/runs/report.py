"""The report of runs: one page of HTML that needs nothing else, neither the network nor the runs.

What the files of a run say is data, whoever has written them: the page's template escapes all of it, and the page's
policy (Content-Security-Policy) lets a browser run no other script than the page's own, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from agents.runs.curves import COLOURS, TOKENS, colour, dash_array, draw, in_groups, line_of, metric_of, panel
from agents.runs.hints import resume_command, trust_option
from agents.runs.run_files import TIMESTEPS, RunFiles, read_run, times

PAGE = Path(__file__).with_name("report_page")
MOST_TIMES = 8  # of the texts of a run
MOST_TOKENS = 12_000  # that are shown one by one, for which there is less than 100 bytes of the page each
MOST_EPISODES = 6  # of a time
FIGURES = {
    "advantage": ("advantage", "as the loss has it", "how much better than expected the token was"),
    "value": ("value", "score", "what the critic expected before it"),
    "kl": ("KL", "nats", "log π − log π_ref when it was sampled"),
    "ratio": ("ratio", "π after the update / π before", "what the update did to it"),
    "entropy": ("entropy", "nats", "how undecided the policy is there"),
    "probability": ("probability", "share", "how probable it was when it was sampled"),
}


def write_report(directories: Sequence[Path], out: Path, title: str | None = None) -> list[RunFiles]:
    """Write the report of runs.

    :param directories: of the runs. Runs that differ in nothing but the seed are drawn as one line with a band.
    :param out: the file, whose directory is there.
    :param title: the title of the page; None: the names of the runs.
    :return: the runs.
    :raises FileNotFoundError: if one is no run.
    :raises ValueError: if one is named twice, or if its files are not what a run writes.
    """
    if len(set(directories)) < len(directories):
        raise ValueError(f"Expected every run once, got {[str(directory) for directory in directories]}.")
    runs = [read_run(directory) for directory in directories]
    out.write_text(report(runs, title), encoding="utf-8", errors="replace")  # JSON can hold halves of characters
    return runs


def report(runs: Sequence[RunFiles], title: str | None = None) -> str:
    """
    :param runs: at least one.
    :param title: of the page; None: the names of the runs.
    :return: the page.
    """
    groups = by_seed(runs)
    script = (PAGE / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tokens"] = lambda number: f"{number:,}"
    return environment.get_template("page.html").render(
        title=title or ", ".join(groups),
        style=(PAGE / "style.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"'sha256-{digest}'",
        summary=summary(groups),
        legend=[
            {"label": label, "number": n, "colour": colour(n), "dashes": dash_array(n)}
            for n, label in enumerate(groups)
        ],
        curves=curves(groups),
        texts=texts(runs),
        figures=FIGURES,
        episodes=episodes(runs),
        again=[again(run) for run in runs],
    )


def by_seed(runs: Sequence[RunFiles]) -> dict[str, list[RunFiles]]:
    """
    :param runs: in the order in which they were named.
    :return: what the runs are called together that differ in nothing but the seed, and these runs.
    """
    alike: dict[str, list[RunFiles]] = {}
    for run in runs:
        rest = {name: value for name, value in run.config.items() if name not in ("seed", "run_dir", "progress")}
        alike.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(run)
    named: dict[str, list[RunFiles]] = {}
    for group in alike.values():
        label = group[0].name
        if len(group) > 1:
            letters_at = zip(*(run.name for run in group), strict=False)
            same = itertools.takewhile(lambda letters: len(set(letters)) == 1, letters_at)
            common = "".join(letters[0] for letters in same).rstrip("-_./ ") or label
            label = f"{common} ({len(group)} seeds)"
        named[label if label not in named else f"{label} {len(named) + 1}"] = group
    return named


def summary(groups: dict[str, list[RunFiles]]) -> list[dict[str, Any]]:
    """
    :param groups: of :func:`by_seed`.
    :return: a row for each run: what it is, and its first and last numbers.
    """
    rows = []
    for number, group in enumerate(groups.values()):
        for run in group:
            ends = {}
            for name in ("objective/scores", "objective/gold_score", "objective/correct", "objective/kl"):
                _, values = run.curve(name)
                ends[name] = f"{values[0]:z.2f} → {values[-1]:z.2f}" if len(values) else "–"
            facts = {name: str(run.config.get(name, "–")) for name in ("algo", "model", "seed")}
            task = run.env.get("task") or run.env.get("reward") or "–"
            rows.append({"run": run.name, "number": number, "status": run.status, "reward": str(task), **facts, **ends})
    return rows


def curves(groups: dict[str, list[RunFiles]]) -> list[dict[str, Any]]:
    """
    :param groups: of :func:`by_seed`.
    :return: a heading each, and the panels under it.
    """
    columns = {name: None for group in groups.values() for run in group for name in run.curves if name != TIMESTEPS}
    longest = 1.02 * max(max(run.timesteps, 1) for group in groups.values() for run in group)  # the same for all panels
    found = []
    for heading, names in in_groups(list(columns)).items():
        panels = []
        for name in names:
            metric = metric_of(name)
            lines = [
                line_of([run.curve(name) for run in group], number, label)
                for number, (label, group) in enumerate(groups.items())
            ]
            with panel(name, TOKENS, metric.unit) as drawn:
                for line in filter(None, lines):
                    draw(drawn.axes, line, metric.unit)
                drawn.axes.set_xlim(0, longest / 1000)
                drawn.told = " ".join(
                    f"{line.label}: from {line.y[0]:z.3g} to {line.y[-1]:z.3g}." for line in lines if line is not None
                )
            panels.append({"title": metric.title, "column": name, "svg": drawn.svg})
        found.append({"heading": heading, "panels": panels})
    return found


def texts(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """
    :param runs: in the order in which they were named.
    :return: ``views``, the texts that a run wrote after so many tokens, ``first`` and ``last``, the numbers of those
        that are shown at the beginning; and ``prompts``, for each prompt its text in each of the views.
    """
    views: list[dict[str, Any]] = []
    prompts: dict[tuple[str, int], dict[str, Any]] = {}
    for run in runs:
        for time in times(run.samples, MOST_TIMES):
            view = len(views)
            views.append({"run": run.name, "time": time})
            seen: dict[str, int] = {}
            for row in (row for row in run.samples if row["timesteps"] == time):
                prompt = row["prompt"]
                seen[prompt] = seen.get(prompt, 0) + 1  # the same prompt may be there twice
                texts = prompts.setdefault((prompt, seen[prompt]), {"prompt": prompt, "texts": []})["texts"]
                numbers = {name: row.get(name) for name in ("score", "gold_score", "correct")}
                texts.append(
                    {
                        "view": view,
                        "completion": row["completion"],
                        "finish": str(row.get("finish_reason", "")),
                        "numbers": {
                            name.replace("_", " "): f"{x:+.2f}" for name, x in numbers.items() if _is_number(x)
                        },
                    }
                )
    of_first = [number for number, view in enumerate(views) if view["run"] == views[0]["run"]]
    return {"views": views, "first": 0, "last": max(of_first, default=0), "prompts": list(prompts.values())}


def episodes(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """
    :param runs: in the order in which they were named.
    :return: the episodes that are shown token by token, of as many times of each run as there is room for.
    """
    for most in range(6, 1, -1):
        chosen = [(run, row) for run in runs for row in _of_times(run, most)]
        if sum(len(row["tokens"]) for _, row in chosen) <= MOST_TOKENS:
            break
    found: list[dict[str, Any]] = []
    left = MOST_TOKENS
    for number, (run, row) in enumerate(chosen):
        left -= len(row["tokens"])
        if left < 0 and found:  # of very long texts there is at least one
            break
        found.append(_episode(number, run, row))
    return found


def _of_times(run: RunFiles, most: int) -> list[dict[str, Any]]:
    chosen = []
    for time in times(run.episodes, most):
        chosen += [row for row in run.episodes if row["timesteps"] == time][:MOST_EPISODES]
    return chosen


def _episode(number: int, run: RunFiles, row: dict[str, Any]) -> dict[str, Any]:
    tokens = [str(token) for token in row["tokens"]]
    figures = {name: _numbers(row.get(name), len(tokens)) for name in (*FIGURES, "return")}
    at = np.arange(len(tokens))
    with panel(f"critic {number}", "token of the response", "score", 7.0, 2.1) as drawn:
        for name, style in (("return", "--"), ("value", "-")):
            drawn.axes.plot(at, figures[name], style, color=COLOURS[0 if name == "value" else 1], linewidth=1.6)
        drawn.axes.axhline(0, color="#999999", linewidth=0.8)
        drawn.told = "What the critic expected, and what it learns from."
    return {
        "run": run.name,
        "time": row["timesteps"],
        "prompt": row["prompt"],
        "score": f"{row['score']:+.2f}" if _is_number(row.get("score")) else "–",
        "finish": str(row.get("finish_reason", "")),
        "tokens": [
            {"text": text, "numbers": ",".join(_shown(figures[name][i]) for name in FIGURES)}
            for i, text in enumerate(tokens)
        ],
        "critic": drawn.svg,
    }


def again(run: RunFiles) -> dict[str, Any]:
    """
    :param run: a run.
    :return: the commands that make it again, go on with it and look at it, and its configuration.
    """
    path, trust = shlex.quote(run.name), trust_option(run.directory)
    other = shlex.quote(run.name.rstrip("/") + "-again")
    commands = {
        "the same run once more": f"textrlhf train --config {path}/config.yaml --run-dir {other}",
        "with another seed": f"textrlhf train --config {path}/config.yaml --run-dir {other} --seed 1",
        "go on with it": resume_command(run.directory),
        "measure its policy": f"textrlhf evaluate --policy {path}{trust}",
        "write with its policy": f"textrlhf play {path}{trust}",
    }
    config = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return {"run": run.name, "status": run.status, "commands": commands, "config": config}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values: Any, n: int) -> list[float]:
    """The n numbers of an episode, NaN where there is none."""
    values = values if isinstance(values, list) else []
    return [float(x) if _is_number(x) else math.nan for x in [*values, *[None] * n][:n]]


def _shown(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.3g}"
