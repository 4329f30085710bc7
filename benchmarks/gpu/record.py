"""What a part has found so far, on disk from the first figure on, and how much time it has left."""

from __future__ import annotations

import contextlib
import gc
import json
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.options import Stage

LEAST = 8.0
"""Seconds with which no stage is begun."""


class Record:
    """The figures of all parts, by name. Each may also be ``{"error": …}`` or ``{"skipped": …}``.

    :param path: the JSON file that is written after each figure.
    :param end: the time at which everything must end, in seconds since the epoch.
    """

    def __init__(self, path: Path, end: float) -> None:
        self.parts: dict[str, dict[str, Any]] = {}
        self._path = path
        self._end = self._stage_end = end
        self._finished = 0
        self._began = 0.0
        self._part = ""

    @property
    def seconds_left(self) -> float:
        """Seconds until the stage must end."""
        return self._stage_end - time.time()

    def begin(self, stage: Stage) -> bool:
        """
        :param stage: what is begun.
        :return: whether there is time for it.
        """
        self._began = time.time()
        if self._end - self._began < LEAST:
            return False
        self._stage_end = min(self._end, self._began + stage.seconds)
        self._part = stage.part
        self.parts.setdefault(stage.part, {"figures": {}, "seconds": 0.0})
        self._write()
        return True

    def finish(self) -> None:
        """The stage has come to its end."""
        self.parts[self._part]["seconds"] += time.time() - self._began
        self._finished += 1
        self._began = 0.0
        self._write()

    def fail(self, what: str) -> None:
        """
        :param what: why the stage can't go on.
        """
        self.parts[self._part] |= {"error": what.strip().splitlines()[-1], "log": what.splitlines()[-30:]}

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """Those of the part that is measured now."""
        found: dict[str, dict[str, Any]] = self.parts[self._part]["figures"]
        return found

    def add(self, name: str, figure: dict[str, Any]) -> None:
        """
        :param name: of the figure.
        :param figure: what was found, as JSON values.
        """
        self.figures[name] = figure
        self._write()

    def _write(self) -> None:
        # As a whole: whoever ends this process in the middle of it would otherwise spoil all that came before.
        beside = self._path.with_suffix(".new")
        state = {"began": self._began, "end": self._stage_end, "finished": self._finished, "parts": self.parts}
        beside.write_text(json.dumps(state))
        beside.replace(self._path)

    @contextlib.contextmanager
    def attempt(self, name: str, needs: float = 0.0) -> Iterator[bool]:
        """Within it an error ends nothing but itself: it becomes the figure of that name.

        :param name: of the figure.
        :param needs: with fewer seconds left than this, the figure says that it is skipped.
        :return: whether there is time.
        """
        enough = self.seconds_left > needs
        if not enough:
            self.add(name, {"skipped": f"{max(self.seconds_left, 0):.0f} s were left, {needs:.0f} s are needed"})
        try:
            yield enough
        except Exception as error:
            self.add(
                name, {"error": f"{type(error).__name__}: {error}"[:2000], "where": traceback.format_exc()[-3000:]}
            )
        # Models that the attempt held are gone with its frame only now.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def spread(numbers: list[float]) -> dict[str, Any]:
    """
    :param numbers: of repeated measurements.
    :return: their median and range, and themselves.
    """
    values = sorted(numbers)
    middle = len(values) // 2
    median = values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
    return {"median": median, "low": values[0], "high": values[-1], "all": numbers}
