"""Worker processes that compare mathematical expressions, each under a time limit that always holds."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

from whet.errors import RewardError

WORKER = Path(__file__).with_name("math_worker.py")
START_LIMIT_S = 60.0
GRACE_S = 1.0
MAX_WORKERS = 4
CACHE_SIZE = 16_384


class MathPool:
    """Compares expressions in processes of its own; safe to use from any thread and event loop.

    Processes start when they are first needed, and one that does not answer in time is killed.
    """

    def __init__(self, num_workers: int) -> None:
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="whet-math")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker() for _ in range(num_workers)]
        for worker in self._workers:
            self._idle.put(worker)
        # Members of a group tend to give the same few answers.
        self._ask = functools.lru_cache(CACHE_SIZE)(self._ask_worker)

    async def equal(self, label: str, answer: str, *, ordered: bool, timeout_s: float) -> bool:
        """Whether `answer` equals `label`; False when that is not settled within `timeout_s` of work.

        Raises RewardError if a worker process cannot be started.
        """
        future = self._threads.submit(self._ask, label, answer, ordered, timeout_s)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the worker processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def _ask_worker(self, label: str, answer: str, ordered: bool, timeout_s: float) -> bool:
        worker = self._idle.get_nowait()  # there are as many workers as threads
        try:
            return worker.ask(label, answer, ordered, timeout_s)
        finally:
            self._idle.put(worker)


@functools.cache
def shared_pool() -> MathPool:
    """The pool of this process, started at its first use."""
    pool = MathPool(min(MAX_WORKERS, os.cpu_count() or 1))
    atexit.register(pool.close)
    return pool


class _Worker:
    """One worker process, started when it is first asked and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, label: str, answer: str, ordered: bool, timeout_s: float) -> bool:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        question = {"label": label, "answer": answer, "ordered": ordered, "timeout_s": timeout_s}
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = self._line(process, timeout_s + GRACE_S)
        except BrokenPipeError:
            line = ""
        if not line:  # out of time, out of memory, or crashed on this answer
            self.kill()
            return False
        return json.loads(line)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.kill()
        with tempfile.TemporaryFile("w+") as complaints:
            # -P: this folder must not stand on the worker's path, where it would hide `math` and `random`.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                encoding="utf-8",
            )
            if not self._line(self._process, START_LIMIT_S):
                self.kill()
                complaints.seek(0)
                raise RewardError(
                    f"a worker of the reward 'math' did not start within {START_LIMIT_S:g} s "
                    f"(is math-verify installed?): {complaints.read().strip()[-500:] or 'it said nothing'}"
                )
        return self._process

    def _line(self, process: subprocess.Popen[str], limit_s: float) -> str:
        return process.stdout.readline() if wait([process.stdout], limit_s) else ""
