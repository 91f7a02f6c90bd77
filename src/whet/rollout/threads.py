"""Threads for functions that may block: users' environments, tools and rewards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any


class Threads:
    """Runs at most `size` functions at a time, each in a thread that nothing waits for once its caller has gone.

    A thread cannot be stopped: one that is stuck is left behind, and its place is free again. Serves one event loop
    after another.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._loop: asyncio.AbstractEventLoop | None = None
        self._free = asyncio.Semaphore(size)

    async def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float | None = None) -> Any:
        """What the function returns. Raises what it raises, and TimeoutError when it takes longer than `timeout_s`,
        the time that it waits for its turn left out."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._free = loop, asyncio.Semaphore(self.size)
        async with self._free, asyncio.timeout(timeout_s):
            return await asyncio.wrap_future(in_thread(function, *arguments))


async def heard(awaitable: Awaitable[Any]) -> Any:
    """What a user's coroutine gives. Raises what it raises; where that would end its caller, as an exception."""
    try:
        return await awaitable
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # it is the caller that is cancelled
            raise
        raise told(error) from error
    except SystemExit as error:
        raise told(error) from error


def told(error: BaseException) -> Exception:
    """The exception itself, or one that tells of it: no future holds a StopIteration, and what is no Exception would
    end who waits for it."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"{type(error).__name__} {error}".rstrip())


def in_thread(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Run a function in a thread that neither the program's end nor another call ever waits for."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            result = function(*arguments)
        except BaseException as error:  # whatever it is belongs to the caller
            future.set_exception(told(error))
        else:
            future.set_result(result)

    future.set_running_or_notify_cancel()
    threading.Thread(target=work, name=f"whet-{getattr(function, '__name__', 'call')}", daemon=True).start()
    return future
