"""How many seeds and rollouts decide: the calculation beside what is known exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.algorithms import power


@pytest.fixture(autouse=True)
def few_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "EXPERIMENTS", 200)
    monkeypatch.setattr(power, "RESAMPLES", 200)


def test_equal_spreads_get_a_verdict_about_as_often_as_the_interval_errs() -> None:
    chance = power.chance_of_a_verdict((1.0, 1.0), 50, np.random.default_rng(0))
    assert chance < 0.12  # 5 %, and what a bootstrap of standard deviations lacks


def test_the_chance_of_a_verdict_grows_with_seeds_and_with_the_difference() -> None:
    chances = [power.chance_of_a_verdict((2.0, 1.0), seeds, np.random.default_rng(0)) for seeds in (5, 15, 50)]
    assert chances == sorted(chances)
    assert chances[-1] > 0.95
    assert power.chance_of_a_verdict((8.0, 1.0), 5, np.random.default_rng(0)) > chances[0]


def test_seeds_are_the_fewest_that_suffice_whatever_the_scale() -> None:
    assert power.seeds_needed((10.0, 1.0)) == power.seeds_needed((1.0, 0.1)) == 5
    assert power.seeds_needed((1.0, 1.0)) is None


def test_rollouts_follow_from_the_root_law() -> None:
    # A difference of 2.8 standard errors (1.96 + 0.84) is found in four experiments of five.
    standard_error = 1.0
    half = 1.96 * standard_error
    assert power.rollouts_needed((2.802, 2.802 - half, 2.802 + half), 10) == 10
    assert power.rollouts_needed((1.401, 1.401 - half, 1.401 + half), 10) == 40


def test_every_comparison_says_what_it_has_and_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        {"algorithm": name, "seed": seed, "score": scale * (-1) ** seed * seed}
        for name, scale in (("ppo", 0.01), ("a2c", 0.5))
        for seed in range(4)
    ]
    (tmp_path / "results.json").write_text(json.dumps(runs))
    minus = {"reinforce": [0.02, 0.0, 0.04], "reinforce-value-cold": [0.1, 0.0, 0.2], "rloo": [0.1, 0.0, 0.2]}
    (tmp_path / "gradient_noise.json").write_text(
        json.dumps({"rollouts": 8, "estimators": {"ppo-cold": {"minus": minus}}})
    )
    found = power.questions(tmp_path, "ppo")
    assert [question["what"] for question in found] == [
        "spread of a2c and of ppo",
        "gradient signal-to-noise of ppo (cold critic) − of reinforce",
    ]
    assert found[0]["needs"] == 5
    assert found[1]["needs"] == power.rollouts_needed((0.02, 0.0, 0.04), 8)
    power.main([str(tmp_path)])
    assert "4 and 4 seeds" in capsys.readouterr().out
