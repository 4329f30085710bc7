"""Two trainings don't write in one directory."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agents.state.lock import DirectoryInUse, locked

ROOT = Path(__file__).parents[2]


@contextmanager
def holder(directory: Path, also: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is killed."""
    code = f"from agents.state.lock import *\nwith locked(Path({str(directory)!r})):\n {also}\n print(1, flush=True)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code + " input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == "1\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def test_the_second_training_in_a_directory_is_told_who_the_first_is(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        (tmp_path / "link").symlink_to(tmp_path)
        for path in (tmp_path, tmp_path / "link"):
            with pytest.raises(DirectoryInUse, match=rf"process {process.pid} on \S+ is writing in "), locked(path):
                pass


def test_a_process_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        assert (tmp_path / ".lock").exists()
        with locked(tmp_path):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_outlives_the_process_does_not_hold_its_lock(tmp_path: Path) -> None:
    with holder(tmp_path, "if os.fork() == 0: import time; time.sleep(20); os._exit(0)") as process:
        process.kill()
        process.wait()
        with locked(tmp_path):
            pass


def test_a_process_does_not_lock_a_directory_twice(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            locked(tmp_path),
            pytest.raises(DirectoryInUse, match="but this very process is writing in"),
            locked(tmp_path / "." / ".." / tmp_path.name),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_removed_meanwhile_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        (tmp_path / "run" / ".lock").unlink()
        (tmp_path / "run").rmdir()


def test_a_file_that_others_make_and_remove_while_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lockf, stat = tmp_path.resolve() / ".lock", fcntl.lockf, Path.stat
    happened: list[str] = []

    def replaced(descriptor: int, *operations: int) -> None:
        lockf(descriptor, *operations)
        if not happened:
            happened.append("replaced")
            path.unlink()
            path.write_text("of another process")

    def removed(self: Path, **options: Any) -> os.stat_result:
        found = stat(self, **options)
        if self == path and happened == ["replaced"]:
            happened.append("removed")
            path.unlink()
        return found

    monkeypatch.setattr(fcntl, "lockf", replaced)
    monkeypatch.setattr(Path, "stat", removed)
    with locked(tmp_path):
        assert str(os.getpid()) in path.read_text()
    assert happened == ["replaced", "removed"]


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="is not locked, since its file system has no locks"), locked(tmp_path):
        pass
