"""When a run writes checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agents.runs.checkpoints import MOST_SECONDS, TIMES_ITS_COST, Checkpoints
from agents.runs.logs import ProgressTable


class Clock:
    """A clock, a history whose every save takes a while on it, and a model that does nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
        self.now = 100.0
        self.cost = cost
        self.saved: list[int] = []
        self.spent = 0.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def save(self, state: dict[str, Any], timesteps: int, value: float | None) -> None:
        self.now += self.cost
        self.spent += self.cost
        self.saved.append(timesteps)


def train(clock: Clock, directory: Path, iterations: int, seconds: float, every: int | None = None) -> None:
    """A training whose iterations take so many seconds."""
    callback = Checkpoints(clock, ProgressTable(directory / "progress.csv", 0), every, None, None)  # type: ignore[arg-type]
    model: Any = SimpleNamespace(_iterations=0)
    model.state = lambda: {"counters": {"_iterations": model._iterations, "num_timesteps": 10 * model._iterations}}
    callback.model = model
    for _ in range(iterations):
        callback._on_rollout_start()
        callback._on_rollout_end()
        clock.now += seconds
        model._iterations += 1
    callback._on_training_end()


@pytest.mark.parametrize(("cost", "seconds"), [(0.01, 1.0), (3.0, 7.0), (20.0, 90.0)])
def test_checkpoints_cost_less_than_two_per_cent_and_the_end_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: float, seconds: float
) -> None:
    clock = Clock(monkeypatch, cost)
    train(clock, tmp_path, 200, seconds)
    assert clock.saved[0] == 10  # soon, so that a disk that is full says so
    assert clock.saved[-1] == 2000
    between = clock.spent - 2 * cost  # the first and the last one are due in any case
    assert between <= (clock.now - 100) / TIMES_ITS_COST
    assert len(clock.saved) > 5


def test_half_an_hour_is_the_longest_that_can_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 100.0)
    train(clock, tmp_path, 100, 60.0)
    gaps = [later - earlier for earlier, later in zip(clock.saved, clock.saved[1:], strict=False)]
    assert max(gaps) * 60 / 10 <= MOST_SECONDS


def test_checkpoints_every_few_iterations_take_no_notice_of_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, 100.0)
    train(clock, tmp_path, 7, 1.0, every=3)
    assert clock.saved == [30, 60, 70]
    train(clock, tmp_path, 6, 1.0, every=3)
    assert clock.saved[3:] == [30, 60]  # the end is one already
