"""Two processes that take turns."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from benchmarks.peers.turns import Child

ROOT = Path(__file__).parents[2]


def child(act: str) -> Child:
    code = f"import sys; from benchmarks.peers.turns import Turns; turns = Turns(); turns.wait(); {act}"
    return Child([sys.executable, "-c", code], ROOT)


def test_a_child_that_prints_more_than_a_pipe_holds_still_answers() -> None:
    talker = child("sys.stderr.write('w' * 2**20); print('p' * 2**20); turns.done(number=5); turns.wait()")
    guard = threading.Timer(60, talker._process.kill)  # else a child that waits for ever would be waited for
    guard.start()
    assert talker.turn()["number"] == 5
    talker.stop()
    guard.cancel()


def test_a_child_that_dies_leaves_its_last_words() -> None:
    with pytest.raises(RuntimeError, match=r"ended early:\n[\s\S]*no more memory"):
        child("raise SystemExit('no more memory')").turn()
