"""A thread with an event loop of its own, in which servers are watched over whatever else the program does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from whet.errors import EngineError

T = TypeVar("T")


class Bridge:
    """Runs coroutines in its loop for callers in any other, and for none."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns; cancelled with its caller."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    @staticmethod
    async def aside(work: Callable[[], T]) -> T:
        """What a function returns that may block, in a thread that nobody waits for at the end of the program."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="whet weights", daemon=True).start()
        return await asyncio.wrap_future(future)

    def wait(self, work: Coroutine[Any, Any, T], timeout_s: float, what: str) -> T:
        """The same for a caller without a loop, who stands still meanwhile. Raises EngineError after the limit."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            future.cancel()
            raise EngineError(f"{what} took longer than {timeout_s:g} s") from error

    def end(self) -> None:
        """Stop the loop and wait for the thread."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(10.0)
        if not self.loop.is_running():
            self.loop.close()
