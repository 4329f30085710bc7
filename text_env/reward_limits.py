"""How long a reward may take, and how often it is tried again."""

from __future__ import annotations

import contextvars
import functools
import inspect
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from text_env.coroutines import run_coroutine
from text_env.finished_texts import FinishedTexts

logger = logging.getLogger(__name__)

FIRST_WAIT = 0.5
"""Seconds before the first retry. Each further wait is twice as long as the one before it."""

LONGEST_WAIT = 30.0
"""Seconds that no wait exceeds."""


class RewardError(RuntimeError):
    """A reward raised, took too long, or returned something other than one finite number per text."""


def reward_name(reward: Any) -> str:
    """
    :param reward: any reward.
    :return: its attribute ``name`` if it has one, otherwise the name of the function or of the class.
    """
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__)


@dataclass(frozen=True)
class Limits:
    """What ``reward_timeout`` and ``reward_retries`` say.

    :param timeout: seconds that one call may take; None: any time.
    :param retries: how often a call that failed is tried again; None: as often as the reward's own attribute
        ``retries`` says, or never where it has none.
    """

    timeout: float | None = None
    retries: int | None = None

    def check(self) -> None:
        """
        :raises ValueError: if one of the two numbers is out of range.
        """
        timeout, retries = self.timeout, self.retries
        if timeout is not None and not (_is_number(timeout, int, float) and 0 < timeout < math.inf):
            raise ValueError(f"Expected reward_timeout to be a number of seconds above 0, or None, got {timeout!r}.")
        if retries is not None and not (_is_number(retries, int) and retries >= 0):
            raise ValueError(f"Expected reward_retries to be an integer of at least 0, or None, got {retries!r}.")


def _is_number(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


NO_LIMITS = Limits()


class LimitedReward:
    """A reward whose calls end in time, and are tried again when they fail.

    A failure is any exception but :class:`RewardError`, or no answer in time. What a reward returned is judged
    afterwards, and a wrong number of scores or a NaN is no reason to ask again. The waits between the tries grow
    exponentially and have no random part, which would be drawn from the generators that a run is reproduced by.

    Python cannot end a thread. A plain function that hangs goes on in its thread, as a daemon that does not keep the
    process alive, and a retry runs beside it; what it returns at last is dropped. An ``async def`` is cancelled.

    :param reward: the reward.
    :param limits: how long, and how often.
    """

    def __init__(self, reward: Any, limits: Limits) -> None:
        self.reward, self.limits, self.name = reward, limits, reward_name(reward)
        self.retries: int = getattr(reward, "retries", 0) if limits.retries is None else limits.retries
        try:  # which keywords the reward takes is read from its signature
            self.__signature__ = inspect.signature(reward)
        except (TypeError, ValueError):  # some functions that are not written in Python
            self.__signature__ = inspect.Signature()

    def __call__(self, **batch: Any) -> Any:
        texts = FinishedTexts.from_keywords(**batch)

        def once() -> Any:
            # Each try is given lists of its own: one that failed may have changed its.
            call = functools.partial(self.reward, **texts.as_keywords(), **texts.extras)
            return _answer(call, self.limits.timeout, len(texts.prompts))

        if not self.retries:
            return once()
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

        retrying = Retrying(
            stop=stop_after_attempt(self.retries + 1),
            wait=wait_exponential(FIRST_WAIT, max=LONGEST_WAIT),
            retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, RewardError)),
            before_sleep=self._say,
            reraise=True,
        )
        try:
            return retrying(once)
        except Exception as error:
            if not isinstance(error, RewardError):
                error.add_note(f"It was tried {self.retries + 1} times (reward_retries={self.retries}).")
            raise

    def _say(self, state: Any) -> None:
        error = state.outcome.exception()
        logger.warning(
            "Reward %r raised %s: %s. Trying again in %.3g s (%d of %d).",
            *(self.name, type(error).__name__, str(error).rstrip("."), state.next_action.sleep),
            *(state.attempt_number, self.retries),
        )


def _answer(call: Callable[[], Any], timeout: float | None, expected: int) -> Any:
    """What a reward returns, once nothing of it is still to be computed."""

    def whole() -> Any:
        returned = call()
        if inspect.isawaitable(returned):
            returned = run_coroutine(returned, timeout)
        # A generator computes while it is read. One value too many is enough to be told so; some have no end.
        return list(islice(returned, expected + 1)) if isinstance(returned, Iterator) else returned

    return whole() if timeout is None else in_time(whole, timeout)


def in_time(call: Callable[[], Any], timeout: float) -> Any:
    """Call a function in a thread of its own, and wait no longer than so long.

    :param call: the function. If it does not end in time, its thread is left alone.
    :param timeout: seconds.
    :return: what the function returned. What it raises is passed on.
    :raises TimeoutError: if it did not end in time.
    """
    ended: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            ended.put((context.run(call), None))
        except BaseException as error:
            ended.put((None, error))

    deadline = time.monotonic() + timeout
    threading.Thread(target=run, name="text_env reward", daemon=True).start()
    late = TimeoutError(f"no answer within reward_timeout={timeout:g} seconds")
    try:
        returned, error = ended.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise late from None
    if isinstance(error, TimeoutError) and time.monotonic() >= deadline:  # a coroutine that was cancelled just now
        raise late from error
    if error is not None:
        raise error
    return returned
