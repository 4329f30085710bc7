"""Runs that are killed, two times here; the benchmark does it fifty times."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import PROMPTS, save_model

from agents.state.history import CheckpointHistory
from agents.state.replacing import replacing
from benchmarks.kills import _half_written, differences, kill_runs


def test_a_run_that_is_killed_twice_ends_as_the_run_that_was_left_alone(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ["--model", save_model(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt")]
    options += ["--reward", "length(budget=3)", "--gold", "None", "--max-new-tokens", "6", "--n-episodes", "8"]
    options += ["--total-timesteps", "240", "--checkpoint-every", "1", "--n-samples", "2", "--device", "cpu"]
    (tmp_path / "runs").mkdir()
    figures = kill_runs(tmp_path / "runs", 2, kills_per_run=2, options=[*options, "--no-progress"], seed=1)
    assert figures["differing"] == {}
    assert (figures["kills"], figures["identical"]) == (2, figures["runs"])
    assert figures["kills_while_a_checkpoint_was_written"] >= 1  # the second one waits for that


def test_a_checkpoint_counts_as_half_written_only_while_it_is(tmp_path: Path) -> None:
    history, start = CheckpointHistory(tmp_path / "checkpoints"), time.time() - 1
    assert not _half_written(tmp_path, start)
    for steps in (1, 2):
        history.save({"policy": {}}, steps)
        assert not _half_written(tmp_path, start)
    with replacing(history.path(2)):  # once more
        assert _half_written(tmp_path, start)
    with replacing(history.path(3)):
        assert _half_written(tmp_path, start)
        assert not _half_written(tmp_path, time.time() + 1)  # an earlier kill has left it
    history.path(1).rename(history.path(1).with_suffix(".partial"))  # as `remove` does, to remove what lies there then
    assert not _half_written(tmp_path, start)


@pytest.mark.parametrize(
    ("last_act", "status"),
    [("sys.exit(3)", 3), ("os.kill(os.getpid(), 15)", -signal.SIGTERM), ("os.kill(os.getpid(), 9)", -signal.SIGKILL)],
)
def test_a_run_that_fails_before_it_is_killed_is_an_error_though_it_would_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_act: str, status: int
) -> None:
    code = "import os, sys\nif sys.argv[-1].endswith('run 0') and not os.path.exists(sys.argv[-1]):\n"
    code += f"    os.mkdir(sys.argv[-1])\n    {last_act}"
    monkeypatch.setattr("benchmarks.kills.TRAIN", ("-c", code))
    with pytest.raises(RuntimeError, match=f"ended with {status} in .*run 0"):
        kill_runs(tmp_path, 1, options=())


def test_a_run_that_hangs_is_an_error_and_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[Any]] = []
    popen = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen[Any]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr("benchmarks.kills.subprocess.Popen", start)
    monkeypatch.setattr("benchmarks.kills.TRAIN", ("-c", "import time; time.sleep(3600)"))
    monkeypatch.setattr("benchmarks.kills.PATIENCE", 0.05)
    with pytest.raises(RuntimeError, match="waited for in vain"):
        kill_runs(tmp_path, 1, options=())
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_runs_that_differ_are_told_apart(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for run in (one, other):
        (run / "policy").mkdir(parents=True)
        (run / "policy" / "model.safetensors").write_text("weights")
        (run / "samples.jsonl").write_text("{}\n")
        (run / "episodes.jsonl").write_text("{}\n")
        (run / "progress.csv").write_text("time/fps,train/loss\n1,0.5\n")
        CheckpointHistory(run / "checkpoints").save({"policy": {"bias": torch.zeros(2)}}, 8)
    (one / "progress.csv").write_text("time/fps,train/loss\n2,0.5\n")  # only the clock differs
    assert differences(one, other) == []
    (one / "progress.csv").write_text("time/fps,train/loss\n1,0.5\n1,0.5\n")
    (one / "samples.jsonl").write_text("{}\n{}\n")
    (one / "policy" / "model.safetensors").write_text("weightz")
    CheckpointHistory(one / "checkpoints").save({"policy": {"bias": torch.tensor([0.0, 1e-7])}}, 8)
    assert differences(one, other) == ["policy/model.safetensors", "samples.jsonl", "progress.csv", "checkpoints"]
    shutil.rmtree(one / "policy")
    (one / "policy").mkdir()
    assert "policy/model.safetensors" in differences(one, other)
