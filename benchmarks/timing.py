"""Timing things alternately, and saying how sure we are.

Speeds of this kind of work drift by tens of percent with the temperature of the machine and with its neighbours, and
the two sides of a ratio drift together. So a ratio is taken of two runs that follow each other, and the median of
several is reported.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    """
    :param run: anything.
    :return: the seconds that it took, the device's work included, and what it returned.
    """
    gc.collect()
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return time.perf_counter() - start, result


def alternate(sides: dict[str, Callable[[], int]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Run every side once a round, the order turned round by round.

    :param sides: name → a run that returns how many tokens it processed.
    :param repeats: rounds that count.
    :param warmup: rounds before them.
    :return: name → tokens per second, one a round.
    """
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warmup, repeats):
        # Whoever comes second finds the caches as the first one left them; so nobody always does.
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            seconds, tokens = seconds_of(sides[name])
            if number >= 0:
                speeds[name].append(tokens / seconds)
    return speeds


def entry(
    ratios: Sequence[float],
    ours: Sequence[float],
    theirs: Sequence[float],
    unit: str,
    what: str,
    **more: Any,
) -> dict[str, Any]:
    """One figure of the table.

    :param ratios: one a repeat.
    :param ours: in ``unit``, one a repeat.
    :param theirs: likewise.
    :param unit: of ours and theirs.
    :param what: one sentence.
    :param more: whatever else belongs to it.
    :return: median of the ratios, quartiles, medians of both sides.
    """
    low, value, high = np.percentile(ratios, [25, 50, 75])
    return {
        "value": float(value),
        "low": float(low),
        "high": float(high),
        "repeats": len(ratios),
        "ours": float(np.median(ours)),
        "theirs": float(np.median(theirs)),
        "unit": unit,
        "what": what,
        **more,
    }


def speed_ratio(ours: Sequence[float], theirs: Sequence[float], what: str, **more: Any) -> dict[str, Any]:
    """How many times faster we are.

    :param ours: tokens per second, one a round.
    :param theirs: of the same rounds.
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return entry(ratios, ours, theirs, "tokens/s", what, **more)


def reached(value: float, goal: str) -> bool | None:
    """
    :param value: of a figure.
    :param goal: ``">= 1.1"`` or ``"<= 0.05"``; empty: none.
    :return: whether it is met, None without one.
    """
    if not goal:
        return None
    sign, number = goal.split()
    return value >= float(number) if sign == ">=" else value <= float(number)


def synchronize() -> None:
    """Wait until the device has finished."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
