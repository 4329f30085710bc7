"""`textrlhf train --resume RUN`: a run that was stopped, in whatever way, ends as if it had not been."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from learners import PROMPTS, even_tokens, save_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.cli import main
from agents.runs.config import load_config
from agents.runs.hints import resume_command
from agents.state import checkpoint
from agents.state.history import CheckpointHistory
from agents.state.replacing import remove

SIZES = ["--max-new-tokens", "6", "--n-episodes", "8", "--batch-size", "4", "--n-epochs", "1", "--device", "cpu"]
SIZES += ["--total-timesteps", "250", "--n-samples", "2", "--sample-every", "2", "--learning-rate", "3e-3"]


class Judge:
    """A reward that does something before one of its answers."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = -1
        self.act: Any = None

    def __call__(self, **batch: Any) -> list[float]:
        self.calls += 1
        if self.calls == self.at:
            self.act()
        return even_tokens(**batch)


judge = Judge()


@pytest.fixture(autouse=True)
def new_judge() -> Iterator[None]:
    judge.__init__()  # type: ignore[misc]
    yield
    judge.__init__()  # type: ignore[misc]


class Runs:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = save_model(root / "model")
        (root / "prompts.txt").write_text("\n".join(PROMPTS))
        self.whole = root / "whole"
        assert self.train(self.whole) == 0

    def train(self, directory: Path, *more: str) -> int:
        names = ["--model", self.model, "--prompts", str(self.root / "prompts.txt"), "--gold", "None"]
        names += ["--reward", "test_resume_command:judge", "--checkpoint-every", "1", "--no-progress"]
        return main(["train", *names, *SIZES, "--run-dir", str(directory), *more])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume"))


def resume(directory: Path, *more: str) -> int:
    """The reward is code, which has to be trusted. TensorBoard reads event files in the order of their names, which
    have the second in which they were begun: another process would need longer than that to start.
    """
    time.sleep(1 - time.time() % 1)
    return main(["train", "--resume", str(directory), "--trust", *more])


def weights(directory: Path) -> dict[str, bytes]:
    # The model card bears the name of the run.
    files = [path for path in sorted((directory / "policy").iterdir()) if path.name != "README.md"]
    return {path.name: path.read_bytes() for path in files}


def rows(directory: Path) -> list[dict[str, str]]:
    """The log, apart from what is measured by the clock."""
    with (directory / "progress.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if "per_second" not in k and k not in CLOCKS} for row in csv.DictReader(file)
        ]


CLOCKS = {"time/fps", "time/time_elapsed"}


def steps(directory: Path) -> list[int]:
    """The steps of a curve, as TensorBoard shows it."""
    events = EventAccumulator(str(directory))
    events.Reload()
    return [event.step for event in events.Scalars("objective/scores")]


def reached(directory: Path) -> list[int]:
    return CheckpointHistory(directory / "checkpoints").timesteps()


def assert_same(directory: Path, whole: Path) -> None:
    assert weights(directory) == weights(whole)
    assert rows(directory) == rows(whole)
    assert steps(directory) == [int(row["time/total_timesteps"]) for row in rows(whole)]
    for name in ("samples.jsonl", "episodes.jsonl"):
        assert (directory / name).read_text() == (whole / name).read_text()
    header = (directory / "progress.csv").read_text().splitlines()[0].split(",")
    assert header == sorted(header)
    assert reached(directory) == [int(row["time/total_timesteps"]) for row in rows(whole)[-2:]]


def kill_at(call: int, number: signal.Signals) -> None:
    judge.at, judge.act = judge.calls + call, lambda: os.kill(os.getpid(), number)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


# ---- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_a_signal_stopped_says_how_to_go_on_and_ends_as_if_nothing_had_been(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    run = tmp_path / "run"
    kill_at(30, number)
    assert runs.train(run) == 128 + number
    last = reached(run)[-1]
    assert (
        said(capsys) == f"Stopped by {number.name}. `textrlhf train --resume {run} --trust` goes on from {last} tokens."
    )
    assert 0 < last < 250
    assert (run / "policy" / "model.safetensors").exists()
    assert resume(run) == 0
    assert_same(run, runs.whole)


def test_a_second_signal_stops_at_once_and_loses_nothing_that_was_saved(runs: Runs, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("goes on after the second signal")

    run = tmp_path / "run"
    judge.at, judge.act = 30, twice
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert runs.train(run) == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not (run / "policy").exists()
    assert resume(run) == 0
    assert_same(run, runs.whole)


def test_a_signal_before_anything_was_learned_leaves_no_run(runs: Runs, tmp_path: Path) -> None:
    kill_at(4, signal.SIGINT)
    assert runs.train(tmp_path / "run") == 130
    assert not (tmp_path / "run").exists()


# ---- other ends ----------------------------------------------------------------------------------------------------


def test_an_error_in_a_rollout_costs_no_finished_iteration(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where no checkpoint was due: the state before the rollout is still there, and is written."""

    def fails() -> None:
        raise RuntimeError("the judge has left")

    run = tmp_path / "run"
    judge.at, judge.act = 30, fails
    assert runs.train(run, "--checkpoint-every", "100") == 1
    [last] = reached(run)
    assert str(last) == rows(run)[-1]["time/total_timesteps"]
    shown = said(capsys)
    assert "the judge has left" in shown
    assert shown.endswith(f"`textrlhf train --resume {run} --trust` goes on from {last} tokens.")
    assert resume(run) == 0
    assert weights(run) == weights(runs.whole)
    assert rows(run) == rows(runs.whole)


def test_what_fails_after_an_error_does_not_hide_it(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def cause() -> None:
        monkeypatch.setattr("agents.policies.causal_lm_policy.CausalLMPolicy.save_pretrained", fails)
        raise ValueError("the cause")

    run = tmp_path / "run"
    judge.at, judge.act = 30, cause
    assert runs.train(run) == 1
    shown = said(capsys)
    assert "the cause" in shown
    assert "Besides, OSError: [Errno 28] No space left on device" in shown
    assert (run / "learning_curve.png").exists()  # what came after the failure was done all the same


def test_an_error_at_the_end_of_a_run_that_went_well_is_an_error(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agents.runs.train.plot_learning_curve", fails)
    assert runs.train(tmp_path / "run", "--total-timesteps", "10") == 1
    assert "Disk full: [Errno 28] No space left on device. Free some space." in said(capsys)
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()
    monkeypatch.undo()
    assert resume(tmp_path / "run") == 0  # nothing is left to train
    assert (tmp_path / "run" / "learning_curve.png").exists()


# ---- what a kill leaves behind -------------------------------------------------------------------------------------


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.whole, tmp_path / "run")
    for name in ("checkpoints", "policy"):
        shutil.rmtree(tmp_path / "run" / name)
    assert resume(tmp_path / "run") == 0
    assert_same(tmp_path / "run", runs.whole)


def test_what_was_logged_after_the_checkpoint_is_dropped_and_half_a_row_too(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs.whole, run)
    remove(CheckpointHistory(run / "checkpoints").path(reached(run)[-1]))
    for name in ("progress.csv", "samples.jsonl", "episodes.jsonl"):
        text = (run / name).read_text()
        (run / name).write_text(text[: text.rstrip().rfind("\n") + 20])
    assert resume(run) == 0
    assert_same(run, runs.whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs.whole, run)
    damaged = CheckpointHistory(run / "checkpoints").path(reached(run)[-1])
    (damaged / "policy.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=f"{damaged.name}.*The checkpoint before it is taken"):
        assert resume(run) == 0
    assert_same(run, runs.whole)


def test_a_run_that_is_over_stays_as_it_is_when_it_is_resumed(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs.whole, run)
    assert resume(run) == 0
    assert_same(run, runs.whole)


def test_a_run_may_be_made_longer(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs.whole, run)
    assert resume(run, "--total-timesteps", "200") == 1
    assert "Expected total_timesteps to be at least the run's own 250, got 200." in said(capsys)
    assert resume(run, "--total-timesteps", "350") == 0
    assert load_config(run / "config.yaml").total_timesteps == 350
    assert rows(run)[: len(rows(runs.whole))] == rows(runs.whole)
    assert int(rows(run)[-1]["time/total_timesteps"]) >= 350
    assert steps(run) == [int(row["time/total_timesteps"]) for row in rows(run)]
    last, following = (float(rows(run)[len(rows(runs.whole)) - 1 + i]["train/learning_rate"]) for i in range(2))
    assert 0 < last < following  # the schedule is the longer run's


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_an_existing_run_is_offered_to_be_resumed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.train(runs.whole) == 1
    assert f"holds a run already: `textrlhf train --resume {runs.whole} --trust` goes on with it" in said(capsys)


def test_a_run_that_was_finished_already_is_said_to_be(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    before = (runs.whole / "progress.csv").read_bytes()
    assert resume(runs.whole, "--no-progress") == 0
    shown = said(capsys)
    assert re.search(r"was finished already, after \d+ tokens: nothing was trained. --total-timesteps makes it", shown)
    assert "Wrote" not in shown
    assert (runs.whole / "progress.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("env", "algo", "trust"),
    [
        *(({}, "ppo", ""), ({"task": "reasoning_gym:chain_sum"}, "ppo", ""), ({"prompts": "builtin:eval"}, "ppo", "")),
        *(({"env": "text_env:TextRLHF-v0"}, "ppo", ""), ({"prompts": ["Which of a:b and c:d?"]}, "ppo", "")),
        *(({}, "mine:Algorithm", " --trust"), ({"env": "mine:Text-v0"}, "ppo", " --trust")),
        *(({"reward": "builtin+0.5*mine:score"}, "ppo", " --trust"), ({"constraint": "mine:few"}, "ppo", " --trust")),
        *(({"reward": {"mine:score": 1.0}}, "ppo", " --trust"), ({"reward": "http://host:8000"}, "ppo", " --trust")),
        ({"task": "sums.jsonl", "task_kwargs": {"match": "mine:equal"}}, "ppo", " --trust"),
        ({"task": "reasoning_gym:countdown", "task_kwargs": {"runs_answers": True}}, "ppo", " --trust"),
    ],
    ids=str,
)
def test_a_command_says_trust_where_the_run_names_code(
    tmp_path: Path, env: dict[str, Any], algo: str, trust: str
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"algo": algo, "env": env}))
    assert resume_command(tmp_path) == f"textrlhf train --resume {tmp_path}{trust}"


def test_a_resumed_run_without_a_progress_bar_leaves_the_bar_to_later_ones(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert runs.train(run, "--progress") == 0
    assert resume(run, "--no-progress") == 0
    assert load_config(run / "config.yaml").progress
    assert resume(runs.whole) == 0
    assert not load_config(runs.whole / "config.yaml").progress  # as it was started


def test_what_cannot_be_resumed_is_refused(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(tmp_path) == 1
    assert f"Expected the directory of a run, which has a config.yaml; found none in {tmp_path}." in said(capsys)
    assert runs.train(tmp_path / "run", "--checkpoint-every", "0", "--total-timesteps", "10") == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert resume(tmp_path / "run") == 1
    assert "was trained with --checkpoint-every 0" in said(capsys)
    with pytest.raises(SystemExit):
        resume(tmp_path / "run", "--seed", "1")
    before = (runs.whole / "progress.csv").read_bytes()
    assert main(["train", "--resume", str(runs.whole)]) == 1
    assert "would import the module 'test_resume_command'" in said(capsys)
    assert (runs.whole / "progress.csv").read_bytes() == before


def test_two_trainings_do_not_share_a_directory(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, shown = tmp_path / "run", []

    def meanwhile() -> None:
        shown.extend([resume(run), said(capsys)])

    judge.at, judge.act = 30, meanwhile
    assert runs.train(run) == 0
    assert shown[0] == 1
    assert str(run) in shown[1]
    assert_same(run, runs.whole)


# ---- which checkpoints there are -----------------------------------------------------------------------------------


def test_the_best_of_no_checkpoints_is_refused(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.train(tmp_path / "run", "--best", "objective/kl", "--checkpoint-every", "0") == 1
    assert "best by 'objective/kl' is kept; got best together with checkpoint_every=0" in said(capsys)
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_by_a_metric_is_kept(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert runs.train(run, "--best", "objective/kl", "--keep", "1") == 0
    best = max(rows(run), key=lambda row: float(row["objective/kl"]))
    history = CheckpointHistory(run / "checkpoints", 1)
    assert len(history.timesteps()) == 1
    assert str(checkpoint.load(history.best)["counters"]["num_timesteps"]) == best["time/total_timesteps"]
    assert runs.train(tmp_path / "other", "--best", "objective/nosuch") == 1
    assert "Expected best to be one of ['completions/clipped_ratio'" in said(capsys)
