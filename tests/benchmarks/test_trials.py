"""The trials of PPO's defaults in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.algorithms.ppo import PPO
from agents.state.arguments import argument_defaults
from benchmarks.trials import TASKS, TRIALS, Options, main


def test_every_trial_is_of_a_known_task_and_of_known_arguments() -> None:
    known = set(argument_defaults(PPO))
    for trial in TRIALS.values():
        assert trial.task in TASKS
        assert set(trial.arguments) <= known


def test_a_trial_runs_and_is_reported_and_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(tmp_path, only=("reward model, 2 epochs, lambda 0.9",), share=0.01, episodes=8)
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("reward model, 2 epochs, lambda 0.9")
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["objective"] == pytest.approx(row["score"] - 0.04 * row["kl"])
    stamp = next((tmp_path / "runs").iterdir()).stat().st_mtime_ns
    assert main(options) == 0
    assert next((tmp_path / "runs").iterdir()).stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="names of trials"):
        main(Options(tmp_path, only=("nothing",)))
