"""The learning rate over a run, as data: it can be written down, so a run that follows it can be resumed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class LearningRate:
    """A learning rate that rises at first, if it is told to, and then stays or falls to 0.

    It is a schedule as Stable-Baselines3 calls one, so it can be the ``learning_rate`` of any of its algorithms too.

    :param peak: the highest rate.
    :param decay: what follows the warm-up: ``"constant"``; ``"linear"``, a straight line to 0 at the end of the run;
        ``"cosine"``, half a cosine wave to 0.
    :param warmup: the part of the run, 0 <= warmup < 1, in which the rate rises in a straight line from 0 to the peak.
    :raises ValueError: for values outside these.
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
        :param progress_remaining: 1 at the start of the run, 0 at its end; Stable-Baselines3 overshoots the end.
        :return: the learning rate there.
        """
        progress_remaining = min(max(progress_remaining, 0.0), 1.0)
        after_warmup = 1 - self.warmup  # the progress that remains when the peak is reached
        if progress_remaining > after_warmup:
            return self.peak * ((1 - progress_remaining) / self.warmup)
        left = progress_remaining / after_warmup  # of the decay, 1 → 0
        if self.decay == "linear":
            return self.peak * left
        if self.decay == "cosine":
            return self.peak * 0.5 * (1 - math.cos(math.pi * left))
        return self.peak

    def to_json(self) -> dict[str, Any]:
        """
        :return: the schedule as a JSON object, which :meth:`from_json` reads.
        """
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LearningRate:
        """
        :param values: what :meth:`to_json` returned.
        :return: the schedule.
        :raises ValueError: for other keys, or values that are out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(f"Expected a learning rate of {sorted(names)}, got {sorted(values)}.")
        return cls(**values)
