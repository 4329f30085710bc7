"""Calls that end: a function that might compute for ever runs in a process of its own, which the kernel ends in time.

A policy may write ``9**9**9**9``, and a single multiplication of integers cannot be interrupted by Python: neither by a
thread nor by a signal handler. A timer whose signal has no handler ends the process in the middle of it.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from text_env.imports import import_object

MEMORY = 4 * 2**30
"""Bytes that the process may allocate."""

READY = "ready\n"


class BoundedCallError(RuntimeError):
    """A function took too long or too much memory, or it raised."""


class OtherProcessError(RuntimeError):
    """The other process cannot work: it does not start, or what a function needs cannot be imported there."""


def call_bounded(function: str, *arguments: Any, seconds: float = 5.0, **keywords: Any) -> Any:
    """Call a function in the other process. One process serves all calls of this one, also those of other threads.

    The process starts with the first call (which takes seconds), and again with the call after one that did not end.

    :param function: the function's name, ``"module:function"``. Importing the module is not part of the time.
    :param arguments: values that JSON can express.
    :param seconds: how long the function may compute, in seconds of processor time, so that it does not matter what
        else the machine does. A function that waits for something else is ended after ten times as long.
    :param keywords: further values that JSON can express, by the names of the function's parameters.
    :return: what the function returned, as JSON expresses it.
    :raises BoundedCallError: if the function did not end, or raised.
    :raises OtherProcessError: if the process does not start, or cannot import the function.
    """
    global _worker
    if _worker.owner != os.getpid():  # a fork: the process belongs to the parent
        _worker.disown()
        _worker = _Worker()
    reply = json.loads(_worker.ask(json.dumps([function, arguments, keywords, seconds]), function))
    if "not imported" in reply:
        raise OtherProcessError(
            f"The process for calls that must end can't import {function!r}: {reply['not imported']}"
        )
    if "error" in reply:
        raise BoundedCallError(f"{function!r} raised {reply['error']}")
    return reply["returned"]


class _Worker:
    """The other process, seen from this one."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: str, function: str) -> str:
        with self._lock:
            try:
                reply = self._exchange(request)
            except BaseException:  # such as an interrupt from the keyboard: its reply must not answer the next request
                self._end()
                raise
            if not reply:
                status = self._end()
                cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                raise BoundedCallError(f"{function!r} did not end within its time and memory ({cause}).")
            return reply

    def _exchange(self, request: str) -> str:
        if self._process is not None and self._process.poll() is not None:  # somebody else has ended it
            self._end()
        if self._process is None:
            self._process = _started()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self._process.stdout.readline()

    def _end(self) -> int:
        """The exit status that the process had, if it had ended by itself."""
        process, self._process = self._process, None
        if process is None:
            return 0
        self._close(process)
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    @staticmethod
    def _close(process: subprocess.Popen[str]) -> None:
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it had not read yet
                pipe.close()

    def disown(self) -> None:
        """Forget the process of the parent, in a forked child."""
        if self._process is not None:
            self._close(self._process)
            self._process.returncode = 0  # it is not this process's to wait for

    def close(self) -> None:
        """End the process."""
        if self.owner == os.getpid():
            self._end()


def _started() -> subprocess.Popen[str]:
    # The same modules can be imported as here. More threads would only take address space.
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", f"from {__name__} import _serve; _serve()"]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8", env=env)
    except OSError as error:
        raise OtherProcessError(f"The process for calls that must end did not start: {error}.") from error
    assert process.stdout is not None
    if process.stdout.readline() != READY:
        process.kill()
        _Worker._close(process)
        raise OtherProcessError(
            f"The process for calls that must end did not start (exit status {process.wait()}); its own message stands "
            f"on stderr."
        )
    return process


def _serve() -> None:
    """The loop of the other process. It ends with its input, that is, with the process that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keyboard interrupts whoever asks
    for ends in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(ends, signal.SIG_DFL)  # the kernel's own answer, which needs no Python: the process ends
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # a function may print
        replies.write(READY)
        replies.flush()
        for line in sys.stdin:
            function, arguments, keywords, seconds = json.loads(line)
            replies.write(_reply(function, arguments, keywords, seconds) + "\n")
            replies.flush()


def _reply(function: str, arguments: list[Any], keywords: dict[str, Any], seconds: float) -> str:
    try:
        called: Callable[..., Any] = import_object(function)
    except Exception as error:
        return json.dumps({"not imported": f"{type(error).__name__}: {error}"})
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
        try:
            return json.dumps({"returned": called(*arguments, **keywords)})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


_worker = _Worker()
atexit.register(lambda: _worker.close())
