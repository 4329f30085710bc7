"""Running the coroutines of rewards that are written as ``async def``."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable
from functools import cache
from typing import TypeVar

T = TypeVar("T")


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of a process, in a thread of its own: a notebook runs one in the main thread already. It is the
    same for all calls, since clients that a reward keeps between calls belong to the loop that they were made in.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="text_env rewards", daemon=True).start()
    return loop


def run_coroutine(awaitable: Awaitable[T], timeout: float | None = None) -> T:
    """
    :param awaitable: what an ``async def`` returns when it is called.
    :param timeout: seconds after which it is cancelled; None: it may take any time.
    :return: its result. What it raises is passed on.
    :raises TimeoutError: if it was cancelled.
    """

    async def awaited() -> T:
        return await asyncio.wait_for(awaitable, timeout)

    # A forked process has none of its parent's threads.
    return asyncio.run_coroutine_threadsafe(awaited(), _loop(os.getpid())).result()
