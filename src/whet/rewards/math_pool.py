"""Worker processes that compare mathematical expressions through math-verify."""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import sys
from pathlib import Path

from whet.rewards.workers import WorkerPool

WORKER = Path(__file__).with_name("math_worker.py")
GRACE_S = 1.0
MAX_WORKERS = 4
CACHE_SIZE = 16_384


class MathPool(WorkerPool):
    """Compares expressions in processes of its own; safe to use from any thread and event loop."""

    def __init__(self, num_workers: int) -> None:
        # -P: this folder must not stand on the worker's path, where it would hide `math` and `random`.
        command = [sys.executable, "-P", str(WORKER)]
        super().__init__(command, num_workers, what="math", remedy=" (is math-verify installed?)")
        # Members of a group tend to give the same few answers.
        self._verdict = functools.lru_cache(CACHE_SIZE)(self._ask_for_verdict)

    async def equal(self, label: str, answer: str, *, ordered: bool, timeout_s: float) -> bool:
        """Whether `answer` equals `label`; False when that is not settled within `timeout_s` of work.

        Raises RewardError if a worker process cannot be started.
        """
        return await asyncio.wrap_future(self._threads.submit(self._verdict, label, answer, ordered, timeout_s))

    def _ask_for_verdict(self, label: str, answer: str, ordered: bool, timeout_s: float) -> bool:
        question = {"label": label, "answer": answer, "ordered": ordered, "timeout_s": timeout_s}
        return bool(self.ask_now(question, timeout_s + GRACE_S))  # without an answer they are not equal


@functools.cache
def shared_pool() -> MathPool:
    """The pool of this process, started at its first use."""
    pool = MathPool(min(MAX_WORKERS, os.cpu_count() or 1))
    atexit.register(pool.close)
    return pool
