"""`agents.objectives.advantages` against arithmetic that can be followed by eye."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.objectives.advantages import (
    discounted_returns,
    gae,
    length_adaptive_lambda,
    rounding_floor,
    signal_share,
    variance,
    whiten,
    whiten_groups,
)

# Two episodes, of three steps and of two; the 99s are padding, which must not be looked at.
REWARDS = np.array([[1.0, 2.0, 3.0], [5.0, -1.0, 99.0]])
VALUES = np.array([[0.5, 1.0, 1.5], [2.0, 0.25, 99.0]])
MASK = np.array([[True, True, True], [True, True, False]])
ENDED = np.zeros(2)


def test_gae_is_the_sum_worked_out_by_hand() -> None:
    # γ = 0.9, λ = 0.5, so γλ = 0.45. First episode, from the back:
    #   δ_2 = 3 + 0.9 · 0   − 1.5 = 1.5        A_2 = 1.5
    #   δ_1 = 2 + 0.9 · 1.5 − 1   = 2.35       A_1 = 2.35 + 0.45 · 1.5   = 3.025
    #   δ_0 = 1 + 0.9 · 1   − 0.5 = 1.4        A_0 = 1.4  + 0.45 · 3.025 = 2.76125
    # Second episode:
    #   δ_1 = −1 + 0.9 · 0    − 0.25 = −1.25   A_1 = −1.25
    #   δ_0 =  5 + 0.9 · 0.25 − 2    = 3.225   A_0 = 3.225 − 0.45 · 1.25 = 2.6625
    advantages, returns = gae(REWARDS, VALUES, ENDED, MASK, gamma=0.9, gae_lambda=0.5)
    np.testing.assert_allclose(advantages, [[2.76125, 3.025, 1.5], [2.6625, -1.25, 0]], rtol=1e-12)
    # The value's targets are A + V.
    np.testing.assert_allclose(returns, [[3.26125, 4.025, 3.0], [4.6625, -1.0, 0]], rtol=1e-12)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.9, 0.6), (0.9, 0.4), (1.0, 0.5), (0.8, 0.5)])
def test_gae_with_another_lambda_or_gamma_misses_by_a_lot(gamma: float, gae_lambda: float) -> None:
    advantages, _ = gae(REWARDS, VALUES, ENDED, MASK, gamma, gae_lambda)
    assert abs(advantages[0, 0] - 2.76125) > 0.1


def test_a_cut_episode_is_bootstrapped_by_the_value_after_its_last_step() -> None:
    # The first episode goes on, with V = 2 for what follows: δ_2 = 3 + 0.9 · 2 − 1.5 = 3.3
    #   A_1 = 2.35 + 0.45 · 3.3 = 3.835 and A_0 = 1.4 + 0.45 · 3.835 = 3.12575. The second one ended as before.
    advantages, _ = gae(REWARDS, VALUES, np.array([2.0, 0.0]), MASK, gamma=0.9, gae_lambda=0.5)
    np.testing.assert_allclose(advantages, [[3.12575, 3.835, 3.3], [2.6625, -1.25, 0]], rtol=1e-12)


def test_returns_are_the_discounted_sums_worked_out_by_hand() -> None:
    # 3;  2 + 0.5 · 3 = 3.5;  1 + 0.5 · 3.5 = 2.75.   −1;  5 − 0.5 · 1 = 4.5
    returns = discounted_returns(REWARDS, ENDED, MASK, gamma=0.5)
    np.testing.assert_allclose(returns, [[2.75, 3.5, 3.0], [4.5, -1.0, 0.0]], rtol=1e-12)
    # With 4 to come after the first episode's cut: 3 + 0.5 · 4 = 5;  2 + 2.5 = 4.5;  1 + 2.25 = 3.25
    returns = discounted_returns(REWARDS, np.array([4.0, 0.0]), MASK, gamma=0.5)
    np.testing.assert_allclose(returns[0], [3.25, 4.5, 5.0], rtol=1e-12)


def test_whitening_is_the_standard_score_worked_out_by_hand() -> None:
    # Mean of 1, 2, 3, 6 is 3; squared deviations 4, 1, 0, 9 have the mean 3.5, so the standard deviation is √3.5.
    np.testing.assert_allclose(
        whiten(np.array([1.0, 2.0, 3.0, 6.0])), np.array([-2, -1, 0, 3]) / np.sqrt(3.5), rtol=1e-7
    )
    assert whiten(np.array([7.0])).tolist() == [0.0]
    assert whiten(np.array([2.0, 2.0, 2.0])).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2, 7, 100, 12_345])
def test_variance_and_whitening_are_to_the_last_bit_what_numpy_makes_of_them(size: int, dtype: type) -> None:
    """With sums in float64."""
    values = np.random.default_rng(size).normal(0.3, 2.0, size).astype(dtype)
    centred = values - float(values.mean(dtype=np.float64))
    spread = np.sqrt(dtype(np.mean((centred - float(centred.mean(dtype=np.float64))) ** 2, dtype=np.float64)))
    mean = float(values.mean(dtype=np.float64))
    assert variance(values) == dtype(np.mean((values - mean) ** 2, dtype=np.float64))
    whitened = whiten(values)
    assert whitened.dtype == dtype
    assert whitened.tobytes() == (centred / (spread + 1e-8)).tobytes()


@pytest.mark.parametrize("number", [0.1, 0.7, 1.7, 1e6 / 3])
def test_equal_advantages_are_whitened_to_zeros_whatever_their_rounding(number: float) -> None:
    equal = np.full(3000, number, np.float32)
    assert not whiten(equal).any()
    assert not whiten_groups(equal, equal, equal, np.full(30, 100), 3).any()


def test_advantages_that_differ_by_rounding_alone_are_equal() -> None:
    noise = np.random.default_rng(0).normal(0.0, 1e-6, 100).astype(np.float32)
    assert whiten(noise).std() == pytest.approx(0.99, abs=0.02)
    assert not whiten(noise, floor=1e-5).any()
    np.testing.assert_array_equal(whiten(1e3 * noise, floor=1e-5), whiten(1e3 * noise))


def test_rounding_of_the_penalty_counts_only_where_the_task_pays_all_texts_the_same() -> None:
    same, different = np.full(4, 0.7), np.array([0.0, 0.0, 0.0, 1.0])
    assert rounding_floor(same, (1e-5, 0.2)) == pytest.approx(0.20001)
    assert rounding_floor(different, (1e-5, 0.2)) == 1e-5
    # Two groups of two texts of one token each. In the first, one text is right; in the second, penalties alone differ.
    advantages = np.array([0.5, -0.5, 0.01, -0.01])
    groups = advantages, advantages, np.array([1.0, 0.0, 0.0, 0.0]), np.ones(4, dtype=int), 2
    np.testing.assert_allclose(whiten_groups(*groups, (1e-5, 0.2)), [1.0, -1.0, 0.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(whiten_groups(*groups), [1.0, -1.0, 1.0, -1.0], rtol=1e-5)  # the control


def test_what_is_not_a_number_stays_so_and_is_not_taken_for_equal() -> None:
    assert np.isnan(whiten(np.array([0.0, np.nan]), floor=1e-5)).all()


def test_whitening_by_a_mean_over_two_processes_is_whitening_of_both_together() -> None:
    everything = np.random.default_rng(0).normal(1.0, 3.0, 50)
    ours, theirs = everything[:20], everything[20:]

    def both_means(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.concatenate([a, b]).mean())

    # The other process's array at each of the three times that a mean is asked for.
    centred = theirs - everything.mean()
    others = iter([theirs, centred, (centred - (everything - everything.mean()).mean()) ** 2])
    whitened = whiten(ours, lambda values: both_means(values, next(others)))
    np.testing.assert_allclose(whitened, whiten(everything)[:20], rtol=1e-12)
    assert np.abs(whiten(ours) - whitened).max() > 0.05  # the control: alone it is something else


def test_groups_are_whitened_one_by_one() -> None:
    # Two groups of two texts, of lengths 1 + 2 and 1 + 1. First: 1, 2, 6 with mean 3 and variance (4 + 1 + 9)/3.
    # Second: 5, 5, which stays zero however large the other group is.
    advantages, lengths = np.array([1.0, 2.0, 6.0, 5.0, 5.0]), np.array([1, 2, 1, 1])
    whitened = whiten_groups(advantages, advantages, advantages, lengths, 2)
    np.testing.assert_allclose(whitened, [*np.array([-2.0, -1.0, 3.0]) / np.sqrt(14 / 3), 0.0, 0.0], atol=1e-7)
    # The second group's texts are paid the same, so that its advantages are errors of the critic alone.
    advantages, returns = np.array([1.0, 2.0, 6.0, 5.0, 4.0]), np.array([1.0, 2.0, 6.0, 3.0, 3.0])
    whitened = whiten_groups(advantages, returns, returns, lengths, 2)
    np.testing.assert_allclose(whitened, [*np.array([-2.0, -1.0, 3.0]) / np.sqrt(14 / 3), 0.0, 0.0], atol=1e-7)


def test_one_group_of_everything_is_whitened_as_the_rollout_is() -> None:
    advantages, lengths = np.random.default_rng(0).normal(1.0, 3.0, 20), np.array([3, 5, 8, 4])
    np.testing.assert_array_equal(whiten_groups(advantages, advantages, advantages, lengths, 4), whiten(advantages))
    assert np.abs(whiten_groups(advantages, advantages, advantages, lengths, 2) - whiten(advantages)).max() > 0.05


def test_the_signal_share_worked_out_by_hand() -> None:
    # Returns 0 and 2 have the standard deviation 1; advantages −2 and 2 have 2, so half of their spread is error.
    returns = np.array([0.0, 2.0])
    assert signal_share(np.array([-2.0, 2.0]), returns) == 0.5
    assert signal_share(np.array([-0.5, 0.5]), returns) == 1.0  # a critic that has taken half of the spread away
    assert signal_share(np.array([-2.0, 2.0]), np.array([1.0, 1.0])) == 0.0
    assert signal_share(np.array([3.0, 3.0]), np.array([1.0, 1.0])) == 1.0  # whitening makes zeros of these


def test_without_a_critic_the_signal_share_is_one_and_an_independent_critic_lowers_it() -> None:
    generator = np.random.default_rng(0)
    returns, noise = generator.normal(size=(2, 100_000))
    assert signal_share(returns, returns) == 1.0
    # Var(G − V) = Var(G) + Var(V) = 1 + 3² for a critic that knows nothing of the returns.
    assert signal_share(returns - 3 * noise, returns) == pytest.approx(1 / math.sqrt(10), rel=0.02)


# ---- identities ----------------------------------------------------------------------------------------------------

numbers = st.floats(-10, 10, allow_subnormal=False)


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    n, t = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    lengths = np.array(draw(st.lists(st.integers(1, t), min_size=n, max_size=n)))
    table = st.lists(st.lists(numbers, min_size=t, max_size=t), min_size=n, max_size=n)
    rewards, values = np.array(draw(table)), np.array(draw(table))
    last = np.array(draw(st.lists(numbers, min_size=n, max_size=n)))
    return rewards, values, last, np.arange(t) < lengths[:, None]


@given(rollouts(), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_lambda_one_is_the_monte_carlo_return_minus_the_value(rollout: tuple[np.ndarray, ...], gamma: float) -> None:
    rewards, values, last, mask = rollout
    advantages, returns = gae(rewards, values, last, mask, gamma, gae_lambda=1.0)
    for row in range(len(rewards)):
        n = int(mask[row].sum())
        for t in range(n):
            powers = gamma ** np.arange(n - t)
            monte_carlo = (powers * rewards[row, t:n]).sum() + gamma ** (n - t) * last[row]
            assert returns[row, t] == pytest.approx(monte_carlo, abs=1e-9)
            assert advantages[row, t] == pytest.approx(monte_carlo - values[row, t], abs=1e-9)
    np.testing.assert_allclose(discounted_returns(rewards, last, mask, gamma), returns, atol=1e-9)


@given(rollouts(), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_lambda_zero_is_the_one_step_temporal_difference(rollout: tuple[np.ndarray, ...], gamma: float) -> None:
    rewards, values, last, mask = rollout
    advantages, _ = gae(rewards, values, last, mask, gamma, gae_lambda=0.0)
    for row in range(len(rewards)):
        n = int(mask[row].sum())
        following = np.append(values[row, 1:n], last[row])
        expected = rewards[row, :n] + gamma * following - values[row, :n]
        np.testing.assert_allclose(advantages[row, :n], expected, atol=1e-9)


@given(rollouts(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_padding_is_never_looked_at_and_stays_zero(rollout: tuple[np.ndarray, ...], gamma: float, lam: float) -> None:
    rewards, values, last, mask = rollout
    clean = gae(np.where(mask, rewards, 0), np.where(mask, values, 0), last, mask, gamma, lam)
    dirty = gae(np.where(mask, rewards, 1e6), np.where(mask, values, -1e6), last, mask, gamma, lam)
    for ours, theirs in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert (ours[~mask] == 0).all()


@given(st.lists(numbers, min_size=2, max_size=30).filter(lambda xs: np.std(xs) > 1e-2), numbers, st.floats(0.1, 10))
@settings(max_examples=100, deadline=None)
def test_whitening_forgets_shift_and_scale(advantages: list[float], shift: float, scale: float) -> None:
    whitened = whiten(np.array(advantages))
    assert whitened.mean() == pytest.approx(0, abs=1e-6)
    assert whitened.std() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(whiten(scale * np.array(advantages) + shift), whitened, atol=1e-4)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"\(2, 3\), \(2, 2\)"):
        gae(REWARDS, VALUES[:, :2], ENDED, MASK, 1.0, 1.0)


def test_each_episode_may_have_a_lambda_of_its_own() -> None:
    both, _ = gae(REWARDS, VALUES, ENDED, MASK, 0.9, np.array([0.5, 1.0]))
    for row, lambda_ in enumerate((0.5, 1.0)):
        one, _ = gae(REWARDS, VALUES, ENDED, MASK, 0.9, lambda_)
        np.testing.assert_array_equal(both[row], one[row])


def test_the_length_adaptive_lambda_is_vapos() -> None:
    # α = 0.05: 1 − 1/(0.05 · 100) = 0.8; 1 − 1/(0.05 · 1000) = 0.98; up to 20 steps it would be negative.
    np.testing.assert_allclose(length_adaptive_lambda(np.array([100, 1000, 10, 20]), 0.05), [0.8, 0.98, 0.0, 0.0])
