"""`agents.objectives.value_targets` against arithmetic that can be followed by eye."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.objectives.value_targets import cross_entropy, hl_gauss, two_hot

SUPPORT = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)  # −1, −½, 0, ½, 1


def doubles(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_two_hot_is_the_one_worked_out_by_hand() -> None:
    # 0.2 is two fifths of the way from 0 to ½; −½ is a point itself; 7 and −7 are beyond the ends.
    found = two_hot(doubles(0.2, -0.5, 7.0, -7.0), SUPPORT)
    expected = [[0, 0, 0.6, 0.4, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_hl_gauss_is_the_one_worked_out_by_hand() -> None:
    # Bins of width ½ around the points. With σ = ¼ and the target 0, the middle one reaches one σ to either side:
    # 0.682689; its neighbours go on to 3 σ: 0.157305 each; the outer ones to 5 σ: 0.001350.
    found = hl_gauss(doubles(0.0), SUPPORT, 0.25)
    np.testing.assert_allclose(found, [[0.001350, 0.157305, 0.682689, 0.157305, 0.001350]], atol=1e-6)
    # At the end of the support half of a normal distribution lies inside but for the ¼ = σ up to the edge: of
    # 0.841345 in all, 0.682689 in the last bin, 0.157305 and 0.001350 in the two before it.
    found = hl_gauss(doubles(1.0), SUPPORT, 0.25)
    np.testing.assert_allclose(found[0, 2:], np.array([0.001350, 0.157305, 0.682689]) / 0.841345, atol=1e-6)


@given(st.lists(st.floats(-3, 5), min_size=1, max_size=10), st.integers(2, 60))
@settings(max_examples=50, deadline=None)
def test_two_hot_has_the_target_as_its_mean(targets: list[float], n_bins: int) -> None:
    support = torch.linspace(-1.0, 2.0, n_bins, dtype=torch.float64)
    found = two_hot(doubles(*targets), support)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(len(targets), dtype=torch.float64))
    torch.testing.assert_close(found @ support, doubles(*targets).clamp(-1, 2), atol=1e-9, rtol=0)
    assert int((found > 1e-9).sum(dim=1).max()) <= 2


@given(st.lists(st.floats(-3, 5), min_size=1, max_size=10), st.floats(0.5, 3.0))
@settings(max_examples=50, deadline=None)
def test_hl_gauss_is_a_distribution_whose_mean_is_the_target_away_from_the_ends(
    targets: list[float], widths: float
) -> None:
    support = torch.linspace(-1.0, 2.0, 51, dtype=torch.float64)
    sigma = widths * float(support[1] - support[0])
    given_, found = doubles(*targets).clamp(-1, 2), hl_gauss(doubles(*targets), support, sigma)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(len(targets), dtype=torch.float64))
    inside = (given_ > -1 + 4 * sigma) & (given_ < 2 - 4 * sigma)
    # What remains is that a bin stands for its middle: 2 exp(−2π²σ²) / 2π widths at most, σ in widths.
    error = 0.06 * (2 * math.exp(-2 * math.pi**2 * widths**2) / (2 * math.pi) + 1e-3)
    distance = (found @ support - given_).abs()
    assert (distance[inside] < error).all()
    # Near an end it lies further inside.
    assert (((found @ support) - given_)[given_ >= 2] < 0).all()
    assert (distance < 2 * sigma).all()


def test_cross_entropy_is_the_one_worked_out_by_hand() -> None:
    # Against a uniform prediction over five it is log 5 whatever the target; against q = (¼, ¾) it is
    # −½ log ¼ − ½ log ¾ = ½ log(16/3).
    uniform = cross_entropy(torch.zeros(2, 5, dtype=torch.float64), two_hot(doubles(0.2, 1.0), SUPPORT))
    np.testing.assert_allclose(uniform, math.log(5))
    logits, target = doubles(0.0, math.log(3.0))[None], doubles(0.5, 0.5)[None]
    assert float(cross_entropy(logits, target)) == pytest.approx(0.5 * math.log(16 / 3))


def test_the_gradient_is_the_difference_of_the_distributions_and_bounded() -> None:
    logits = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    cross_entropy(logits, two_hot(doubles(1e6), SUPPORT)).sum().backward()
    np.testing.assert_allclose(logits.grad, [[0.2, 0.2, 0.2, 0.2, -0.8]])
