"""The benchmark of the built-in arithmetic, in miniature, from the entry point that `make arithmetic` calls."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import arithmetic
from benchmarks.arithmetic import Options, answers_at_random, main, mean_and_interval

FIELDS = {
    *("algorithm", "seed", "tokens", "seconds", "kl", "accuracy_before", "accuracy_after", "greedy_after"),
    *("longer_before", "longer_after", "mean_length"),
}


def test_every_run_is_written_down_with_its_figures_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"ppo": {"n_episodes": 8, "learning_rate": 0.0}, "grpo": {"n_episodes": 8, "learning_rate": 0.0}}
    monkeypatch.setattr(arithmetic, "SETTINGS", small)
    options = Options(tmp_path, ("ppo", "grpo", "control"), seeds=1, total_timesteps=1, episodes=8)
    status = main(options)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["algorithm"] for row in rows] == ["ppo", "grpo", "control"]
    for row in rows:
        assert set(row) >= FIELDS
        assert row["kl"] == pytest.approx(0, abs=1e-4)  # a learning rate of 0 changes nothing
        assert row["greedy_after"] == row["greedy_before"]
        assert 20 < row["mean_length"] < 300
        assert len(row["curve"]["tokens"]) == 1
    assert status == int(rows[0]["greedy_after"] < 0.9 or rows[0]["accuracy_after"] < 0.85)
    assert (tmp_path / "learning_curves.png").stat().st_size > 5_000
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + 3
    assert "Held-out arithmetic" in capsys.readouterr().out
    monkeypatch.setattr(arithmetic, "train", None)
    main(options)
    assert json.loads((tmp_path / "results.json").read_text()) == rows


def test_the_control_answers_without_looking() -> None:
    np.random.seed(0)
    scores = answers_at_random(["right"] * 1000)
    assert set(scores) == {0.0, 1.0}
    assert 0.4 < sum(scores) / 1000 < 0.6


def test_the_interval_over_seeds_is_students() -> None:
    mean, low, high = mean_and_interval([1.0, 2.0, 3.0])
    assert (mean, (low + high) / 2) == (2.0, 2.0)
    assert high - low == pytest.approx(2 * 4.3027 / math.sqrt(3), rel=1e-3)  # t of 2 degrees of freedom
    assert mean_and_interval([0.5]) == (0.5, 0.5, 0.5)
