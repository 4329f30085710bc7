"""Which checkpoints of a run are there, and which of them a run goes on from. Faults: test_faults.py."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.state import checkpoint
from agents.state.history import CheckpointHistory
from agents.state.manifest import CheckpointError


def state(number: int) -> dict[str, Any]:
    return {"policy": {"w": torch.full((3,), float(number))}, "number": number}


def numbers(history: CheckpointHistory) -> list[str]:
    return sorted(path.name.lstrip("0") for path in history.directory.iterdir())


def damage(path: Path) -> None:
    (path / "state.json").write_text("{}")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_few_are_kept(tmp_path: Path, keep: int) -> None:
    history = CheckpointHistory(tmp_path / "run" / "checkpoints", keep)
    assert history.timesteps() == []
    for number in range(1, 6):
        assert history.save(state(number), number) == history.path(number)
        assert history.timesteps() == list(range(1, number + 1))[-keep:]
        path, tree = history.newest()
        assert (path, tree["number"], history.damaged) == (history.path(number), number, [])
    assert numbers(history) == [str(number) for number in range(1, 6)][-keep:]


def test_the_best_is_kept_besides_as_long_as_it_is_the_best(tmp_path: Path) -> None:
    history = CheckpointHistory(tmp_path)
    best = []
    for number, value in enumerate([None, 1.0, float("nan"), 0.5, 2.0, 2.0, -1.0, None], start=1):
        CheckpointHistory(tmp_path).save(state(number), number, value)  # a process of its own knows it all the same
        best.append(checkpoint.load(history.best)["number"] if history.best.exists() else None)
    assert best == [None, 2, 2, 2, 5, 5, 5, 5]
    assert numbers(history) == ["7", "8", "best"]


def test_a_best_that_a_kill_has_kept_from_its_place_gets_there_with_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = CheckpointHistory(tmp_path, keep=1)
    history.save(state(1), 1, 1.0)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "copy", killed)
    with pytest.raises(KeyboardInterrupt):
        history.save(state(2), 2, 5.0)
    monkeypatch.undo()
    history.save(state(3), 3, 3.0)
    assert checkpoint.load(history.best)["number"] == 2
    assert numbers(history) == ["3", "best"]


def test_the_best_takes_no_room_of_its_own(tmp_path: Path) -> None:
    history = CheckpointHistory(tmp_path)
    path = history.save(state(1), 1, 1.0)
    assert all(file.samefile(path / file.name) for file in history.best.iterdir())


def test_the_best_is_a_copy_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    history = CheckpointHistory(tmp_path)
    path = history.save(state(1), 1, 1.0)
    assert not any(file.samefile(path / file.name) for file in history.best.iterdir())
    assert checkpoint.load(history.best)["number"] == 1


def test_a_damaged_one_is_named_and_the_one_before_it_taken(tmp_path: Path) -> None:
    history = CheckpointHistory(tmp_path, keep=3)
    for number in (1, 2, 3):
        history.save(state(number), number)
    damage(history.path(3))
    path, tree = history.newest()
    assert (path, tree["number"]) == (history.path(2), 2)
    [(damaged, reason)] = history.damaged
    assert damaged == history.path(3)
    assert "state.json has 2 bytes in place of" in reason
    shutil.rmtree(history.path(3))
    assert history.newest()[0] == history.path(2)
    assert history.damaged == []


def test_a_run_that_went_back_leaves_its_abandoned_future_behind(tmp_path: Path) -> None:
    """Otherwise the damaged one would stay the newest, and what is saved now would be the first to be removed."""
    history = CheckpointHistory(tmp_path, keep=1)
    history.save(state(10), 10)
    shutil.copytree(history.path(10), history.path(20))
    damage(history.path(20))
    assert history.newest()[1]["number"] == 10
    history.save(state(15), 15)
    assert history.timesteps() == [15]
    assert history.newest()[1]["number"] == 15


def test_a_history_of_nothing_and_one_of_damaged_ones_say_so(tmp_path: Path) -> None:
    history = CheckpointHistory(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Expected checkpoints in .*, found none"):
        history.newest()
    for number in (1, 2):
        damage(history.save(state(number), number))
    with pytest.raises(CheckpointError, match=r"all are damaged: .*0002 as they were.*; .*0001 as they were"):
        history.newest()
    assert len(history.damaged) == 2


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_keeping_none_is_refused(tmp_path: Path, keep: Any) -> None:
    with pytest.raises(ValueError, match="Expected to keep at least 1 checkpoint, got keep="):
        CheckpointHistory(tmp_path, keep)


# ---- how files get to the disk -------------------------------------------------------------------------------------


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place_and_its_place_is_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power, a name may be on the disk whose contents are not: unless they were sent there before."""
    checkpoint.save(tmp_path / "new" / "checkpoint", state(1))
    calls: list[tuple[str, Any]] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(("fsync", os.fstat(file).st_ino)), fsync(file))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", Path(b).name)), replace(a, b))[1])
    checkpoint.save(tmp_path / "new" / "checkpoint", state(2))
    directory = tmp_path / "new" / "checkpoint"
    *written, aside, placed, parent = calls
    assert {number for _, number in written} == {path.stat().st_ino for path in (*directory.iterdir(), directory)}
    assert (aside, placed) == (("replace", "checkpoint.previous"), ("replace", "checkpoint"))
    assert parent == ("fsync", directory.parent.stat().st_ino)


@pytest.mark.parametrize("function", ["write_text", "replace", "fsync", "save_file"])
def test_an_error_at_any_step_leaves_the_old_checkpoint_alone_in_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    checkpoint.save(tmp_path / "checkpoint", state(1))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner: Any = {"write_text": Path, "save_file": checkpoint}.get(function, os)
    monkeypatch.setattr(owner, function, full)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(tmp_path / "checkpoint", state(2))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert checkpoint.load(tmp_path / "checkpoint")["number"] == 1


def test_safetensors_errors_are_those_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        checkpoint._write({"w": torch.zeros(1)}, tmp_path / "nowhere" / "policy.safetensors")
    assert error.value.filename == str(tmp_path / "nowhere" / "policy.safetensors")
