"""Runs that are killed, two times here; the benchmark does it fifty times."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from learners import PROMPTS, save_model

from benchmarks.kills import differences, kill_runs


def test_a_run_that_is_killed_twice_ends_as_the_run_that_was_left_alone(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ["--model", save_model(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt")]
    options += ["--reward", "length(budget=3)", "--gold", "None", "--max-new-tokens", "6", "--n-episodes", "8"]
    options += ["--total-timesteps", "800", "--checkpoint-every", "1", "--n-samples", "2", "--device", "cpu"]
    (tmp_path / "runs").mkdir()
    figures = kill_runs(tmp_path / "runs", 2, kills_per_run=2, options=[*options, "--no-progress"], seed=1)
    assert figures["differing"] == {}
    assert (figures["kills"], figures["identical"]) == (2, figures["runs"])


def test_runs_that_differ_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "other"):
        (tmp_path / name / "policy").mkdir(parents=True)
        (tmp_path / name / "policy" / "model.safetensors").write_text("weights")
        (tmp_path / name / "samples.jsonl").write_text("{}\n")
        (tmp_path / name / "episodes.jsonl").write_text("{}\n")
        (tmp_path / name / "progress.csv").write_text("time/fps,train/loss\n1,0.5\n")
    one, other = tmp_path / "one", tmp_path / "other"
    monkeypatch.setattr("benchmarks.kills.CheckpointHistory.newest", lambda _: (tmp_path, {"policy": {}}))
    (one / "progress.csv").write_text("time/fps,train/loss\n2,0.5\n")  # only the clock differs
    assert differences(one, other) == []
    (one / "progress.csv").write_text("time/fps,train/loss\n1,0.5\n1,0.5\n")
    (one / "samples.jsonl").write_text("{}\n{}\n")
    (one / "policy" / "model.safetensors").write_text("weightz")
    assert differences(one, other) == ["policy/model.safetensors", "samples.jsonl", "progress.csv"]
    shutil.rmtree(one / "policy")
    (one / "policy").mkdir()
    assert "policy/model.safetensors" in differences(one, other)
