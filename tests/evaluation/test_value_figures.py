"""The figures of a critic, worked out by hand and held against samples whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from agents.evaluation.value_figures import (
    calibration_bins,
    decided_pairs,
    kendall_tau,
    ordered_right,
    sampling_variance,
    value_figures,
)


def test_the_figures_of_four_states_are_those_worked_out_by_hand() -> None:
    values = np.array([1.0, 2.0, 3.0, 6.0])
    outcomes = np.array([[0.0, 2.0], [1.0, 3.0], [4.0, 6.0], [4.0, 6.0]])
    # Means 1, 2, 5, 5; each has an estimated variance of 2 around its true value, and half of that is its mean's.
    assert sampling_variance(outcomes).tolist() == [1, 1, 1, 1]
    figures = value_figures(values, outcomes)
    assert (figures["mean_value"], figures["mean_outcome"], figures["bias"]) == (3.0, 3.25, -0.25)
    # Errors 0, 0, −2, 1: their mean square 5/4 and their variance (5 − 4 · 1/16) / 3 both lose the 1 that is chance.
    assert figures["rmse"] == pytest.approx(np.sqrt(0.25))
    assert figures["branch_rmse"] == pytest.approx(np.sqrt(2))
    assert figures["worth_branches"] == pytest.approx(2 / 0.25)
    unexplained, spread = (5 - 0.25) / 3 - 1, (2.25**2 + 1.25**2 + 2 * 1.75**2) / 3 - 1
    assert figures["explained_variance"] == pytest.approx(1 - unexplained / spread)
    # Of the six pairs the values order all, the means five, and these alike.
    assert figures["kendall_tau"] == pytest.approx(5 / np.sqrt(6 * 5))


@pytest.mark.parametrize("branches", [2, 4])
def test_with_chance_taken_away_a_perfect_critic_is_perfect_however_few_the_branches(branches: int) -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=3_000)
    outcomes = true[:, None] + 1.5 * random.normal(size=(3_000, branches))
    figures = value_figures(true, outcomes)
    assert figures["explained_variance"] == pytest.approx(1, abs=0.2)
    assert figures["rmse"] == pytest.approx(0, abs=0.4)
    assert figures["branch_rmse"] == pytest.approx(1.5, abs=0.1)
    # Without the correction it would seem to leave much of the variance unexplained.
    naive = 1 - (true - outcomes.mean(axis=1)).var() / outcomes.mean(axis=1).var()
    assert naive < 0.7


def test_a_critic_with_half_of_the_variance_explains_that_half() -> None:
    random = np.random.default_rng(0)
    known, hidden = random.normal(size=(2, 3_000))
    outcomes = (known + hidden)[:, None] + random.normal(size=(3_000, 4))
    figures = value_figures(known + 3, outcomes)
    assert figures["explained_variance"] == pytest.approx(0.5, abs=0.1)
    assert figures["bias"] == pytest.approx(3, abs=0.1)
    assert figures["rmse"] == pytest.approx(np.sqrt(1 + 9), abs=0.1)


def test_what_cannot_be_said_is_none() -> None:
    alike = value_figures(np.array([1.0, 2.0]), np.ones((2, 3)))
    assert (alike["explained_variance"], alike["kendall_tau"]) == (None, None)
    certain = value_figures(np.array([1.0, 2.0]), np.array([[1.0, 1.0], [2.0, 2.0]]))
    assert (certain["worth_branches"], certain["rmse"], certain["explained_variance"]) == (None, 0.0, 1.0)


def test_tau_is_one_for_one_order_and_minus_one_for_its_reverse() -> None:
    order = np.array([3.0, 1.0, 2.0])
    assert kendall_tau(order, 10 * order - 4) == pytest.approx(1)
    assert kendall_tau(order, -order) == pytest.approx(-1)
    assert kendall_tau(order, np.array([1.0, 1.0, 1.0])) is None
    # One swap of neighbours among four: five pairs alike, one not.
    assert kendall_tau(np.arange(4.0), np.array([0.0, 2.0, 1.0, 3.0])) == pytest.approx(4 / 6)


def test_bins_go_from_low_values_to_high_ones_and_hold_every_state_once() -> None:
    values = np.array([5.0, 1.0, 3.0, 7.0, 2.0])
    outcomes = np.repeat(10 * values[:, None], 2, axis=1)
    bins = calibration_bins(values, outcomes, n_bins=2)
    assert [(b["states"], b["value"], b["outcome"]) for b in bins] == [(3, 2.0, 20.0), (2, 6.0, 60.0)]
    assert bins[1]["outcome_se"] == pytest.approx(10 / np.sqrt(2))
    assert len(calibration_bins(values, outcomes)) == 5  # no bin is empty


def test_a_pair_is_decided_if_its_means_are_more_than_two_standard_errors_apart() -> None:
    spread = np.array([-1.0, 1.0])  # the mean of two has a standard error of 1, the difference of two means √2
    pairs = np.array([[spread + gap, spread] for gap in (2.8, 2.9, -2.9, 0.0)])
    assert decided_pairs(pairs).tolist() == [False, True, True, False]
    assert decided_pairs(np.array([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.1, 1.1]]])).tolist() == [False, True]


def test_an_order_is_right_wrong_or_half_right() -> None:
    outcomes = np.array([[[2.0, 4.0], [1.0, 1.0]]] * 3)
    estimates = np.array([[0.2, 0.1], [0.1, 0.2], [0.1, 0.1]])
    assert ordered_right(estimates, outcomes).tolist() == [1.0, 0.0, 0.5]
    assert ordered_right(estimates, outcomes[:, ::-1]).tolist() == [0.0, 1.0, 0.5]
