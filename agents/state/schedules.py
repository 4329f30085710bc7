"""The learning rate during a run, as data. It can be saved, so a run with such a schedule can be resumed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class LearningRate:
    """A learning rate that optionally warms up, and then stays constant or decays to 0.

    It is a schedule in Stable-Baselines3's sense, so it can be the ``learning_rate`` of SB3's algorithms too.

    :param peak: the highest learning rate, at least 0.
    :param decay: what follows the warm-up: ``"constant"``; ``"linear"``, a straight line to 0 at the end of the run; or
        ``"cosine"``, half a cosine wave to 0.
    :param warmup: the share of the run in which the rate rises in a straight line from 0 to the peak, 0 <= warmup < 1.
    :raises ValueError: if a value is outside its range.
    """

    peak: float
    decay: Decay = "constant"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("peak", self.peak), ("warmup", self.warmup)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"Expected the {name} of a learning rate to be a number, got {value!r}.")
        if not (math.isfinite(self.peak) and self.peak >= 0):
            raise ValueError(f"Expected a finite learning rate >= 0, got a peak of {self.peak}.")
        if self.decay not in get_args(Decay):
            raise ValueError(f"Expected the decay to be one of {', '.join(get_args(Decay))}, got {self.decay!r}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"Expected a warm-up of 0 <= warmup < 1, the part of the run that it takes (0.1: a tenth), got "
                f"{self.warmup}."
            )

    def __call__(self, progress_remaining: float) -> float:
        """
        :param progress_remaining: the remaining progress, from 1 at the start of the run to 0 at its end.
            Stable-Baselines3 may pass negative numbers, which count as 0.
        :return: the learning rate at this point.
        """
        progress_remaining = min(max(progress_remaining, 0.0), 1.0)
        after_warmup = 1 - self.warmup  # the remaining progress at which the peak is reached
        if progress_remaining > after_warmup:
            return self.peak * ((1 - progress_remaining) / self.warmup)
        left = progress_remaining / after_warmup  # the remaining share of the decay, from 1 to 0
        if self.decay == "linear":
            return self.peak * left
        if self.decay == "cosine":
            return self.peak * 0.5 * (1 - math.cos(math.pi * left))
        return self.peak

    def to_json(self) -> dict[str, Any]:
        """
        :return: the schedule as a JSON object, which :meth:`from_json` takes.
        """
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LearningRate:
        """
        :param values: what :meth:`to_json` returned.
        :return: the schedule.
        :raises ValueError: if a key is missing or unknown, or if a value is outside its range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(f"Expected a learning rate of {sorted(names)}, got {sorted(values)}.")
        return cls(**values)
