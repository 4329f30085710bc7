"""What the directory of a run holds, read as data: nothing is imported or run for it, whoever has written the files.

A training may be writing them at the same time, so a last line that isn't finished is left out.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.runs.yaml_values import mapping, read_mapping
from agents.state.lock import in_use

TIMESTEPS = "time/total_timesteps"


@dataclass(frozen=True)
class RunFiles:
    """A run.

    :param directory: the directory, as it was named.
    :param config: the options of ``config.yaml``, those of the environment under ``env``.
    :param curves: ``progress.csv``: a float64 array [I] for each column of numbers, NaN where an iteration has none.
    :param samples: the rows of ``samples.jsonl``.
    :param episodes: the rows of ``episodes.jsonl``, which runs before it was introduced don't have.
    :param running: whether a training is writing in the directory now.
    """

    directory: Path
    config: dict[str, Any]
    curves: dict[str, np.ndarray]
    samples: list[dict[str, Any]]
    episodes: list[dict[str, Any]]
    running: bool

    @property
    def name(self) -> str:
        """The directory, as it was named."""
        return str(self.directory)

    @property
    def timesteps(self) -> int:
        """The tokens of all finished iterations."""
        tokens = self.curves.get(TIMESTEPS)
        return 0 if tokens is None or not len(tokens) else int(np.nanmax(tokens))

    @property
    def total_timesteps(self) -> int:
        """The tokens that the run is to have; 0 if its configuration doesn't say."""
        total = self.config.get("total_timesteps")
        return int(total) if isinstance(total, int) else 0

    @property
    def env(self) -> dict[str, Any]:
        """The options of the environment."""
        return mapping("env", self.config.get("env"))

    @property
    def status(self) -> str:
        """Whether it is running, finished or stopped, and how far it is."""
        done, total = self.timesteps, self.total_timesteps
        state = "running" if self.running else "finished" if done >= total else "stopped"
        return f"{state}, {done:,} of {total:,} tokens" if done < total else f"{state}, {done:,} tokens"

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """
        :param name: of a column.
        :return: tokens and numbers, without the iterations that have none; both are empty if there is no such column.
        """
        numbers, tokens = self.curves.get(name), self.curves.get(TIMESTEPS)
        if numbers is None or tokens is None:
            return np.zeros(0), np.zeros(0)
        known = np.isfinite(numbers) & np.isfinite(tokens)
        return tokens[known], numbers[known]


def read_run(directory: Path) -> RunFiles:
    """
    :param directory: of a run.
    :return: what it holds.
    :raises FileNotFoundError: if it is no run.
    :raises ValueError: if its files are not what a run writes.
    """
    if not (directory / "config.yaml").is_file():
        raise FileNotFoundError(
            f"Expected the directory of a run, which has a config.yaml; found none in {directory}. "
            "`textrlhf train --run-dir DIRECTORY` makes one."
        )
    return RunFiles(
        directory,
        read_mapping(directory / "config.yaml"),
        _columns(directory / "progress.csv"),
        _rows(directory / "samples.jsonl", {"timesteps": int, "prompt": str, "completion": str}),
        _rows(directory / "episodes.jsonl", {"timesteps": int, "prompt": str, "tokens": list}),
        in_use(directory),
    )


def whole_lines(path: Path) -> str:
    """
    :param path: a file that may be being written, or not be there.
    :return: what it holds, up to its last end of line.
    """
    if not path.exists():
        return ""
    with path.open(newline="") as file:
        text = file.read()
    return text[: text.rfind("\n") + 1]


def _columns(path: Path) -> dict[str, np.ndarray]:
    rows = list(csv.DictReader(io.StringIO(whole_lines(path))))
    names = [name for name in (rows[0] if rows else {}) if name is not None]
    columns = {name: np.array([_number(row.get(name)) for row in rows]) for name in names}
    return {name: column for name, column in columns.items() if np.isfinite(column).any()}


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _rows(path: Path, kinds: dict[str, type]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(whole_lines(path).split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in kinds.items()):
            raise ValueError(f"Expected {path}, line {number}, to be a row with {sorted(kinds)}; got {line[:80]!r}.")
        rows.append(row)
    return rows


def times(rows: Sequence[dict[str, Any]], most: int | None = None) -> list[int]:
    """
    :param rows: of ``samples.jsonl`` or ``episodes.jsonl``.
    :param most: the number of times that are wanted, at least 2; None: all.
    :return: the numbers of tokens after which rows were written: the first, the last, and others at equal distances.
    """
    found = sorted({row["timesteps"] for row in rows})
    if most is None or len(found) <= most:
        return found
    return [found[round(at)] for at in np.linspace(0, len(found) - 1, most)]
