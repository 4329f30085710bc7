"""Calls that end: what would compute for ever is ended, and nobody else notices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from text_env import bounded_calls
from text_env.bounded_calls import BoundedCallError, OtherProcessError, call_bounded

HERE = f"{__name__}:"


def pid() -> int:
    print("a function may print")
    return os.getpid()


def power(base: int, exponent: int) -> int:
    return (base**exponent) % 10


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def grab() -> int:
    return len(bytearray(bounded_calls.MEMORY))


def fail(message: str) -> None:
    raise KeyError(message)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def echo(value: Any) -> Any:
    return value


def test_calls_go_to_one_other_process_and_bring_json_back() -> None:
    other = call_bounded(HERE + "pid")
    assert other != os.getpid()
    assert call_bounded(HERE + "pid") == other
    value = {"text": "a\nb \ud800 \x00 ☃", "list": [1, 2.5, None, True]}
    assert call_bounded(HERE + "echo", value) == value


def test_a_multiplication_that_python_cannot_interrupt_is_ended_and_the_next_call_works() -> None:
    before = call_bounded(HERE + "pid")
    with pytest.raises(BoundedCallError, match=r"power' did not end within its time and memory \(SIGPROF\)"):
        call_bounded(HERE + "power", 9, 9**9, seconds=0.2)
    assert call_bounded(HERE + "power", 9, 9, seconds=0.2) == 9
    assert call_bounded(HERE + "pid") != before


def test_waiting_is_ended_too() -> None:
    with pytest.raises(BoundedCallError, match="SIGALRM"):
        call_bounded(HERE + "sleep", 60, seconds=0.02)


def test_time_counts_from_call_to_call() -> None:
    for _ in range(8):
        call_bounded(HERE + "sleep", 0.1, seconds=0.05)


def test_memory_is_bounded() -> None:
    with pytest.raises(BoundedCallError, match="grab' raised MemoryError"):
        call_bounded(HERE + "grab")


def test_what_the_function_raises_is_named_and_the_process_lives_on() -> None:
    before = call_bounded(HERE + "pid")
    with pytest.raises(BoundedCallError, match="fail' raised KeyError: 'odd'"):
        call_bounded(HERE + "fail", "odd")
    assert call_bounded(HERE + "pid") == before


def test_a_function_that_cannot_be_imported_there_is_another_error_than_one_that_raises() -> None:
    with pytest.raises(OtherProcessError, match=r"can't import 'nowhere:nothing': ValueError: .* no module 'nowhere'"):
        call_bounded("nowhere:nothing")
    assert not issubclass(OtherProcessError, BoundedCallError)
    assert call_bounded(HERE + "echo", 1) == 1


def test_a_process_that_dies_is_started_again() -> None:
    with pytest.raises(BoundedCallError, match="SIGKILL"):
        call_bounded(HERE + "kill_itself")
    before = call_bounded(HERE + "pid")
    os.kill(before, signal.SIGKILL)  # between two calls, neither of which is lost
    assert bounded_calls._worker._process is not None
    bounded_calls._worker._process.wait()
    assert call_bounded(HERE + "pid") != before


def test_threads_get_their_own_replies() -> None:
    replies: dict[int, list[int]] = {}

    def ask(name: int) -> None:
        replies[name] = [call_bounded(HERE + "echo", 100 * name + number) for number in range(20)]

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == {name: [100 * name + number for number in range(20)] for name in range(4)}


def test_an_interrupt_while_waiting_does_not_leave_a_reply_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = bounded_calls._Worker._exchange

    def interrupted(worker: Any, request: str) -> str:
        monkeypatch.undo()
        exchange(worker, request)
        raise KeyboardInterrupt

    monkeypatch.setattr(bounded_calls._Worker, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call_bounded(HERE + "echo", 1)
    assert call_bounded(HERE + "echo", 2) == 2


SCRIPT = """
import os
from text_env.bounded_calls import call_bounded
child_of = call_bounded("os:getpid")
print(child_of, flush=True)
pid = os.fork()
if pid == 0:
    own = call_bounded("os:getpid")
    assert own != child_of
    os.kill(own, 9)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert call_bounded("os:getpid") == child_of
"""


def test_a_fork_gets_a_process_of_its_own_and_none_is_left_behind() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_a_process_that_does_not_start_is_an_error_and_no_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_calls, "_worker", bounded_calls._Worker())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OtherProcessError, match=r"did not start \(exit status 1\)"):
        call_bounded(HERE + "pid")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(OtherProcessError, match=r"did not start: .*No such file.*/nowhere/python"):
        call_bounded(HERE + "pid")
