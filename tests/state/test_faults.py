"""Checkpoints under the faults of `benchmarks.faults`: nothing is lost, and nothing damaged is taken for good."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agents.state import checkpoint
from agents.state.history import CheckpointHistory
from agents.state.manifest import MANIFEST, CheckpointError, verify
from benchmarks.faults import FAILED, SAVES, examine_damages, small_state

ROOT = Path(__file__).parents[2]
FIRST, THIRD, ALONE = "the first of a history", "the third of a history that keeps two", "one in place of another"


def save_state(number: int, path: Path) -> None:
    checkpoint.save(path, small_state(number))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of saves that were interrupted, in a process without threads, since it forks."""
    script = f"""
import json, shutil
from contextlib import contextmanager
from pathlib import Path
from benchmarks.faults import SAVES, checkpoint, killed_at_every_call, too_large_at_every_size

@contextmanager
def in_place(directory):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    yield directory

work = Path({str(tmp_path_factory.mktemp("work"))!r})
third, alone = ({{name: SAVES[name]}} for name in ({THIRD!r}, {ALONE!r}))
found = {{
    "killed, third": killed_at_every_call(work / "0", third),
    "killed, alone": killed_at_every_call(work / "1", alone),
    "full, third": too_large_at_every_size(work / "2", 64, third),
    "full, alone": too_large_at_every_size(work / "3", 64, alone),
}}
checkpoint.replacing = in_place
print(json.dumps({{**found, "killed, in place": killed_at_every_call(work / "4", alone)}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_damage_is_refused_by_name_and_repaired_from_the_checkpoint_before(tmp_path: Path) -> None:
    found = examine_damages(tmp_path, save_state, flips=40)
    assert found["cases"] >= 200
    assert len(found["by_kind"]) == 11
    assert (found["accepted"], found["unnamed"], found["unrepaired"]) == ([], [], [])


def test_without_the_manifest_damages_would_be_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: what was accepted before there was one."""
    monkeypatch.setattr(checkpoint, "verify", lambda directory: None)
    found = examine_damages(tmp_path, save_state, flips=10)
    assert len(found["accepted"]) > 30
    assert {case.split(":")[0] for case in found["accepted"]} >= {
        "a bit is flipped",
        "files of a later checkpoint are mixed in",
        "there is an unknown file",
    }


@pytest.mark.parametrize(("what", "points"), [("third", 80), ("alone", 30)])
def test_a_process_that_is_killed_at_any_call_of_a_save_loses_nothing(
    interrupted: dict[str, Any], what: str, points: int
) -> None:
    assert interrupted[f"killed, {what}"]["points"] >= points
    assert interrupted[f"killed, {what}"]["lost"] == []


@pytest.mark.parametrize("what", ["third", "alone"])
def test_a_disk_that_is_full_at_any_write_leaves_the_old_checkpoint_and_no_half_of_a_new_one(
    interrupted: dict[str, Any], what: str
) -> None:
    assert interrupted[f"full, {what}"]["points"] >= 8
    assert interrupted[f"full, {what}"]["lost"] == []


def test_a_directory_that_is_written_in_place_would_be_lost(interrupted: dict[str, Any]) -> None:
    """A negative control."""
    found = interrupted["killed, in place"]
    assert len(found["lost"]) > found["points"] / 2


def test_an_error_that_names_another_file_is_none_that_names_the_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative control."""

    def name_one(directory: Path) -> None:
        try:
            verify(directory)
        except CheckpointError as error:
            raise CheckpointError("policy.safetensors is damaged") from error

    monkeypatch.setattr(checkpoint, "verify", name_one)
    unnamed = examine_damages(tmp_path, save_state, flips=0)["unnamed"]
    assert "files of a later checkpoint are mixed in: state.json" in unnamed
    assert "files of a later checkpoint are mixed in: policy.safetensors" not in unnamed


@pytest.mark.parametrize("name", [THIRD, ALONE])
def test_a_save_that_writes_nothing_and_says_that_it_has_would_be_noticed(tmp_path: Path, name: str) -> None:
    """A negative control: what is there is what a save that failed may leave."""
    save = SAVES[name]
    save.prepare(tmp_path / "saves")
    assert str(save.lost(tmp_path / "saves", ended=0)).endswith(f" is {save.before[-1]}")
    assert save.lost(tmp_path / "saves", FAILED) is None


@pytest.mark.parametrize(("name", "best"), [(FIRST, 7), (THIRD, 2)])
def test_a_best_that_is_not_the_best_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, best: int
) -> None:
    """A negative control."""
    SAVES[name].prepare(tmp_path / "saves")
    monkeypatch.setattr(
        CheckpointHistory, "_keep_best", lambda history: checkpoint.save(history.best, small_state(best))
    )
    SAVES[name].do(tmp_path / "saves")
    assert SAVES[name].lost(tmp_path / "saves", -signal.SIGKILL) == f"the best is {best}"


def test_the_manifest_lists_every_other_file(tmp_path: Path) -> None:
    save_state(1, tmp_path / "checkpoint")
    content = json.loads((tmp_path / "checkpoint" / MANIFEST).read_text())
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint").iterdir() if path.name != MANIFEST}
    assert {name: facts["size"] for name, facts in content["files"].items()} == sizes
    assert content["format"] == 1
