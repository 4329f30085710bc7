"""The checkpoints of a run: the newest few of them, and the best one besides."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from agents.state import checkpoint
from agents.state.checkpoint import Tree
from agents.state.manifest import CheckpointError, notes_of
from agents.state.replacing import PREVIOUS, present, remove, remove_leftovers

BEST = "best"  # the name of the best checkpoint's directory


class CheckpointHistory:
    """A directory of checkpoints, each in a directory named after its timesteps (``000000012800``).

    A process that is killed at any moment leaves at least the checkpoint that was the newest before. A newest
    checkpoint that the disk has damaged is passed over for the one before it.

    :param directory: the directory. It is made by the first :meth:`save`.
    :param keep: how many of the newest checkpoints are kept, at least 1.
    :raises ValueError: if ``keep`` is no whole number of at least 1.
    """

    def __init__(self, directory: str | Path, keep: int = 2) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"Expected to keep at least 1 checkpoint, got keep={keep!r}.")
        self.directory = Path(directory)
        self.keep = keep
        self.damaged: list[tuple[Path, str]] = []  # what `newest` has passed over: the checkpoint, and why

    @property
    def best(self) -> Path:
        """The directory of the checkpoint that had the highest value; there may be none."""
        return self.directory / BEST

    def timesteps(self) -> list[int]:
        """
        :return: the timesteps of the checkpoints that are there, damaged ones included, from the oldest to the newest.
        """
        if not self.directory.is_dir():
            return []
        # One that was being replaced when the process was killed may be there under its second name alone.
        names = (path.name.removesuffix(PREVIOUS) for path in self.directory.iterdir() if path.is_dir())
        return sorted({int(name) for name in names if re.fullmatch(r"\d{12}", name)})

    def path(self, timesteps: int) -> Path:
        """
        :param timesteps: the timesteps of a checkpoint.
        :return: its directory.
        """
        return self.directory / f"{timesteps:012d}"

    def save(self, tree: Mapping[str, Any], timesteps: int, value: float | None = None) -> Path:
        """Write a checkpoint, and then remove those that are no longer kept.

        What this training saves last is its newest: checkpoints of more timesteps, which a training that went on from
        an older one leaves behind, are removed too.

        :param tree: the state, as for :func:`agents.state.checkpoint.save`.
        :param timesteps: the timesteps that the training has seen.
        :param value: how good this state is. The checkpoint of the highest value so far is kept under :attr:`best`
            besides, as long as it may be. None or NaN: it is not considered.
        :return: the directory of the checkpoint.
        :raises FloatingPointError: if a tensor holds NaN or an infinite number.
        :raises OSError: if it can't be written; all earlier checkpoints are as they were.
        """
        remove_leftovers(self.directory)
        path = self.path(timesteps)
        considered = value is not None and not math.isnan(value)
        notes = {"timesteps": timesteps, **({"value": value} if considered else {})}
        checkpoint.save(path, tree, notes, finite=True)
        self._keep_best()
        present = self.timesteps()
        kept = [steps for steps in present if steps <= timesteps][-self.keep :]
        for steps in present:
            if steps not in kept:
                remove(self.path(steps))
        return path

    def newest(self) -> tuple[Path, Tree]:
        """Read the newest checkpoint that is intact. Newer ones that are not are listed in :attr:`damaged`.

        :return: its directory, and its tree.
        :raises FileNotFoundError: if there is no checkpoint.
        :raises CheckpointError: if all of them are damaged; it names each, and what is wrong with it.
        """
        self.damaged = []
        for steps in reversed(self.timesteps()):
            path = self.path(steps)
            try:
                return path, checkpoint.load(path)
            except (CheckpointError, OSError) as error:  # a disk that can't read a file says so by an OSError
                self.damaged.append((path, str(error)))
        if self.damaged:
            reasons = "; ".join(reason for _, reason in self.damaged)
            raise CheckpointError(f"Expected an intact checkpoint in {self.directory}, but all are damaged: {reasons}")
        raise FileNotFoundError(f"Expected checkpoints in {self.directory}, found none.")

    def _keep_best(self) -> None:
        """Those that are there are asked, and not only the one just written: a kill may have come in between."""
        value = {steps: self._value(self.path(steps)) for steps in self.timesteps()}
        for steps in sorted(value, key=value.__getitem__, reverse=True):
            if value[steps] <= self._value(self.best):
                break
            with suppress(CheckpointError):  # a damaged one is not the best
                checkpoint.copy(self.path(steps), self.best)

    @staticmethod
    def _value(path: Path) -> float:
        """The value of a checkpoint; minus infinity if it has none, is damaged or isn't there."""
        try:
            return float(notes_of(present(path)).get("value", -math.inf))
        except (CheckpointError, OSError):
            return -math.inf
