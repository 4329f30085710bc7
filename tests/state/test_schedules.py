"""Learning rates: what they are along a run, and that they can be written down."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learners import make_ppo

from agents.state.schedules import LearningRate

DECAYS = ["constant", "linear", "cosine"]


def test_the_rates_are_those_worked_out_by_hand() -> None:
    at = (1.0, 0.75, 0.5, 0.25, 0.0)
    half_root = math.sqrt(0.5) / 2
    for decay, expected in (
        ("constant", [8.0, 8.0, 8.0, 8.0, 8.0]),
        ("linear", [8.0, 6.0, 4.0, 2.0, 0.0]),
        ("cosine", [8.0, 8 * (0.5 + half_root), 4.0, 8 * (0.5 - half_root), 0.0]),
    ):
        rate = LearningRate(8.0, decay)  # type: ignore[arg-type]
        assert [rate(progress) for progress in at] == pytest.approx(expected, abs=1e-12), decay


def test_a_warm_up_rises_from_zero_and_the_rest_of_the_run_is_the_decay() -> None:
    at = (1.0, 0.875, 0.75, 0.375, 0.0)  # a quarter of the run is warm-up; 0.375 is the middle of what follows it
    for decay, middle, end in (("constant", 8.0, 8.0), ("linear", 4.0, 0.0), ("cosine", 4.0, 0.0)):
        rate = LearningRate(8.0, decay, warmup=0.25)  # type: ignore[arg-type]
        assert [rate(progress) for progress in at] == pytest.approx([0.0, 4.0, 8.0, middle, end], abs=1e-12), decay


@given(st.floats(0, 1), st.floats(1e-8, 1))
def test_linear_without_a_warm_up_is_to_the_last_bit_peak_times_progress(progress: float, peak: float) -> None:
    assert LearningRate(peak, "linear")(progress) == peak * progress


@pytest.mark.parametrize("decay", DECAYS)
@given(st.floats(-0.5, 1.5), st.floats(0, 0.99))
def test_a_rate_is_never_below_zero_nor_above_the_peak(decay: Any, progress: float, warmup: float) -> None:
    assert 0 <= LearningRate(3e-4, decay, warmup)(progress) <= 3e-4


@pytest.mark.parametrize("decay", DECAYS)
def test_a_rate_never_jumps(decay: Any) -> None:
    rates = [LearningRate(1.0, decay, 0.1)(progress) for progress in np.linspace(1, 0, 10_001)]
    assert np.abs(np.diff(rates)).max() <= 1.01 * 1e-4 / 0.1  # no steeper than the warm-up


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1e-4,), "Expected a finite learning rate >= 0, got a peak of -0.0001"),
        ((math.inf,), "Expected a finite learning rate >= 0, got a peak of inf"),
        ((math.nan,), "Expected a finite learning rate >= 0, got a peak of nan"),
        (("1e-4",), "Expected the peak of a learning rate to be a number, got '1e-4'"),
        ((True,), "Expected the peak of a learning rate to be a number, got True"),
        ((1e-4, "exponential"), "Expected the decay to be one of constant, linear, cosine, got 'exponential'"),
        ((1e-4, "linear", 1.0), r"0 <= warmup < 1, the part of the run .* got 1\.0"),
        ((1e-4, "linear", -0.1), r"0 <= warmup < 1, the part of the run .* got -0\.1"),
        ((1e-4, "linear", 100), r"0 <= warmup < 1, the part of the run .* got 100"),
        ((1e-4, "linear", None), "Expected the warmup of a learning rate to be a number, got None"),
    ],
)
def test_what_is_no_learning_rate_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRate(*arguments)


@pytest.mark.parametrize("rate", [LearningRate(3e-4), LearningRate(1 / 3, "linear", 0.1), LearningRate(0.0, "cosine")])
def test_a_rate_goes_through_json_and_comes_back(rate: LearningRate) -> None:
    written = json.loads(json.dumps(rate.to_json()))
    assert LearningRate.from_json(written) == rate
    with pytest.raises(dataclasses.FrozenInstanceError):
        rate.peak = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("values", [{}, {"peak": 1e-4}, {"peak": 1e-4, "decay": "linear", "warmup": 0, "code": "m:f"}])
def test_json_that_is_no_rate_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected a learning rate of \['decay', 'peak', 'warmup'\], got \["):
        LearningRate.from_json(values)


def test_a_training_follows_the_rate() -> None:
    model = make_ppo(learning_rate=LearningRate(1e-3, "linear", 0.5))
    rates = []
    train = model.train

    def note_then_train() -> None:
        train()
        rates.append((model._current_progress_remaining, model.policy.optimizer.param_groups[0]["lr"]))

    model.train = note_then_train  # type: ignore[method-assign]
    model.learn(300)
    assert [rate for _, rate in rates] == [LearningRate(1e-3, "linear", 0.5)(progress) for progress, _ in rates]
    assert 0 < rates[0][1] < max(rate for _, rate in rates)  # it rose
    assert 0 < rates[-1][1] == min(rate for _, rate in rates)  # read in the middle of the last rollout, an update too


def test_a_constant_rate_and_a_number_train_alike() -> None:
    weights = [make_ppo(learning_rate=rate).learn(1).policy.state_dict() for rate in (1e-3, LearningRate(1e-3))]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
