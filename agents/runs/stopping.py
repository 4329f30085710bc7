"""How a run ends before its time: by signals, and by errors that must not hide one another."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, Self

from stable_baselines3.common.callbacks import BaseCallback

from agents.algorithms.engine import RankLost

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal has stopped the training.

    :param number: the signal.
    :param at_once: whether it was the second one, after which nothing more is written.
    """

    def __init__(self, number: int, at_once: bool = False) -> None:
        super().__init__(f"Stopped by {signal.Signals(number).name}.")
        self.number = number
        self.at_once = at_once


class StopOnSignal(BaseCallback):
    """Stops a training at SIGINT or SIGTERM, where nothing is lost by it; a second signal stops it at once.

    As a context it handles the two signals. As a callback it raises :class:`Stopped` after one of them: at the next
    token of a rollout, or when the update that it came into is over.
    """

    def __init__(self) -> None:
        super().__init__()
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only this thread may handle signals
            self._before = {number: signal.signal(number, self._received) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_back()
        if self._number is not None and isinstance(error, RankLost):  # the other was stopped as well, and ended first
            stopped = Stopped(self._number)
            for note in getattr(error, "__notes__", ()):
                stopped.add_note(note)
            raise stopped from error

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:
            self._give_back()
            raise Stopped(number, at_once=True)
        self._number = number
        # Not `print`, which the signal may have interrupted.
        os.write(2, b"\nStopping after this step; once more stops at once.\n")

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_rollout_start(self) -> None:
        self._check()

    def _on_step(self) -> bool:
        self._check()
        return True

    def _check(self) -> None:
        if self._number is not None:
            raise Stopped(self._number)


def take_every(steps: Iterable[Callable[[], object]], cause: BaseException | None = None) -> None:
    """Take every step, even where one before it has failed.

    :param steps: the steps.
    :param cause: the error after which they are taken. What goes wrong besides becomes a note of it.
    :raises Exception: without a cause, the first error of the steps, with those after it as its notes.
    """
    first = cause
    for step in steps:
        try:
            step()
        except Exception as error:
            if first is None:
                first = error
            elif str(error) != str(first):  # such as a disk that is still full
                first.add_note(f"Besides, {type(error).__name__}: {error}")
    if first is not None and cause is None:
        raise first
