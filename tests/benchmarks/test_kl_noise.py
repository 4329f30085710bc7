"""The benchmark of the KL divergence's noise: its statistics, and a whole measurement on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learners import make_env, make_model

from benchmarks.kl_noise import Spread, measure


def test_the_noise_is_the_trace_of_the_covariance() -> None:
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = Spread()
    for vector in vectors:
        spread.add(vector)
    assert spread.noise == pytest.approx(float(vectors.var(dim=0).sum()))
    assert spread.square_of_mean == pytest.approx(float(vectors.mean(dim=0).square().sum()))


def test_the_exact_divergence_and_its_gradient_are_less_noisy_and_agree_with_k1s() -> None:
    figures = measure(
        600, 12, 8, (0.1,), make_env(32), policy_kwargs={"model": make_model(ends=0.1)}, learning_rate=1e-2, kl_coef=0.0
    )
    divergence = figures["divergence"]
    assert divergence["exact"]["mean"] > 0.1
    assert divergence["exact"]["std"] < divergence["k1"]["std"]
    assert set(figures["gradient"]) == {"divergence alone", "PPO, β = 0.1"}
    assert figures["gradient"]["divergence alone"]["ratio"] < 0.9
    for row in figures["gradient"].values():
        assert row["ratio"] == pytest.approx(row["noise"]["exact"] / row["noise"]["k1"])
        assert np.isfinite(row["agreement"])
        assert row["agreement"] < 4
