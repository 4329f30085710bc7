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


class Record:
    """The figures of a part, by name. Each may also be ``{"error": …}`` or ``{"skipped": …}``.

    :param path: the JSON file that is written after each figure.
    :param end: the time at which the part must end, in seconds since the epoch: imports have taken some of it already.
    """

    def __init__(self, path: Path, end: float) -> None:
        self.figures: dict[str, dict[str, Any]] = {}
        self._path = path
        self._end = end

    @property
    def seconds_left(self) -> float:
        """Seconds until the part must end."""
        return self._end - time.time()

    def add(self, name: str, figure: dict[str, Any]) -> None:
        """
        :param name: of the figure.
        :param figure: what was found, as JSON values.
        """
        self.figures[name] = figure
        # As a whole: whoever ends this process in the middle of it would otherwise spoil all that came before.
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(self.figures))
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
