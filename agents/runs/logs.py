"""What a run logs, as files that a resumed run continues: each is first cut back to what the checkpoint knows of."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat, filter_excluded_keys
from torch.utils.tensorboard import SummaryWriter

from agents.runs.run_files import TIMESTEPS, whole_lines
from agents.state.replacing import sync


def run_logger(directory: Path, timesteps: int | None = None) -> Logger:
    """The logger of a run: ``progress.csv`` and TensorBoard events.

    :param directory: the directory of the run.
    :param timesteps: of a run that is resumed, the tokens that its checkpoint has seen; what was logged after them is
        dropped. None: the run is a new one.
    :return: the logger, whose first output is a :class:`ProgressTable`.
    """
    table = ProgressTable(directory / "progress.csv", timesteps or 0)
    return Logger(str(directory), [table, Events(directory, None if timesteps is None else timesteps + 1)])


class ProgressTable(KVWriter):
    """``progress.csv``: a row for each iteration, with its columns in alphabetical order.

    The columns of SB3's own table stand in the order of a set, which differs from process to process. A metric that
    first appears later gets its column, too: the file is then written anew, in one step.

    :param path: the file.
    :param timesteps: rows of an earlier process up to so many tokens are kept.
    """

    def __init__(self, path: Path, timesteps: int) -> None:
        self._path = path
        kept = csv.DictReader(io.StringIO(whole_lines(path)))
        self._rows = [{k: v for k, v in row.items() if v} for row in kept if int(row[TIMESTEPS]) <= timesteps]
        self._write_all()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[dict[str, str]]:
        """The rows of all iterations."""
        return self._rows

    @property
    def latest(self) -> dict[str, str]:
        """The row of the latest iteration; nothing if none is finished."""
        return self._rows[-1] if self._rows else {}

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Add a row.

        :param key_values: the numbers and texts, by name; pictures and the like are left to TensorBoard.
        :param key_excluded: the outputs that a name is not for.
        :param step: the number of tokens so far.
        """
        values = filter_excluded_keys(key_values, key_excluded, "csv").items()
        row = {name: str(value) for name, value in values if isinstance(value, str | int | float | np.generic)}
        self._rows.append(row)
        if row.keys() <= set(self._columns):
            with self._path.open("a", newline="") as file:
                file.write(_as_csv(self._columns, [row]))
        else:
            self._write_all()

    def sync(self) -> None:
        """Wait until all rows have reached the disk, as a checkpoint that knows of them will."""
        sync(self._path)

    def close(self) -> None:
        """Nothing is left to do: each row is in the file."""

    def _write_all(self) -> None:
        self._columns = sorted({name for row in self._rows for name in row})
        header = dict(zip(self._columns, self._columns, strict=True))
        replace_text(self._path, _as_csv(self._columns, [header, *self._rows]) if self._rows else "")


class Events(TensorBoardOutputFormat):
    """SB3's TensorBoard output, as the continuation of an earlier process's.

    :param directory: where the event file is written.
    :param purge_step: TensorBoard forgets what earlier files in the directory say of this step and later ones.
    """

    def __init__(self, directory: Path, purge_step: int | None) -> None:
        self.writer = SummaryWriter(log_dir=str(directory), purge_step=purge_step)
        self._is_closed = False


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Cut a file of JSON lines back.

    :param path: the file; if there is none, nothing is done.
    :param keep: a function that says whether a row is kept. A last line that isn't complete is dropped.
    """
    if path.exists():
        lines = whole_lines(path).split("\n")[:-1]  # and not at every character that Python takes for an end of line
        replace_text(path, "".join(f"{line}\n" for line in lines if keep(json.loads(line))))


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: whenever the process is killed, the file is the old one or the new one.

    :param path: the file.
    :param text: what it is to hold.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        file.write(text)
    sync(partial)
    partial.replace(path)


def _as_csv(columns: list[str], rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()
