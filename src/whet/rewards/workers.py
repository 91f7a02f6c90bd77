"""Worker processes that answer questions, each under a time limit that always holds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import Any

from whet.errors import RewardError

START_LIMIT_S = 60.0


class WorkerPool:
    """Processes that read one JSON question per line and answer with one JSON line; safe to use from any thread
    and event loop.

    A process starts when it is first needed, and one that does not answer in time is killed. Before its first
    answer it says one JSON line by itself, that it is ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        num_workers: int,
        *,
        what: str,
        remedy: str = "",
        env: Mapping[str, str] | None = None,
        detached: bool = False,
    ) -> None:
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix=f"whet-{what}")
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._workers = [
            Worker(command, what=what, remedy=remedy, env=env, detached=detached) for _ in range(num_workers)
        ]
        for worker in self._workers:
            self._idle.put(worker)

    async def ask(self, question: Any, limit_s: float) -> Any | None:
        """The answer, or None if it took too long or the process died of the question.

        Raises RewardError if a process cannot be started.
        """
        return await asyncio.wrap_future(self._threads.submit(self.ask_now, question, limit_s))

    def ask_now(self, question: Any, limit_s: float) -> Any | None:
        """The same, while the calling thread waits. No more threads may ask at a time than there are workers."""
        worker = self._idle.get()
        try:
            return worker.ask(question, limit_s)
        finally:
            self._idle.put(worker)

    def greeting(self) -> Any:
        """What a process said when it was ready. Raises RewardError if none can be started."""
        worker = self._idle.get()
        try:
            worker.start()
            return worker.greeting
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the worker processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()


class Worker:
    """One worker process, started when it is first asked and again after it was killed."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        what: str,
        remedy: str = "",
        env: Mapping[str, str] | None = None,
        detached: bool = False,
    ) -> None:
        self._command, self._env, self._detached = list(command), env, detached
        self._what, self._remedy = what, remedy
        self._process: subprocess.Popen[str] | None = None
        self.greeting: Any = None
        """What the process said when it was ready."""

    def ask(self, question: Any, limit_s: float) -> Any | None:
        """The answer, or None if there was none in time: the process is then killed."""
        process = self.start()
        assert process.stdin is not None, "it is a pipe"
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = self._line(process, limit_s)
        except BrokenPipeError:
            line = ""
        if not line:  # out of time, out of memory, or crashed on this question
            self.kill()
            return None
        return json.loads(line)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None and process.stdout is not None, "both are pipes"
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def start(self) -> subprocess.Popen[str]:
        """The running process. Raises RewardError if there is none and none can be had."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.kill()
        with tempfile.TemporaryFile("w+") as complaints:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                encoding="utf-8",
                env=self._env,
                start_new_session=self._detached,
            )
            line = self._line(self._process, START_LIMIT_S)
            if not line:
                self.kill()
                complaints.seek(0)
                raise RewardError(
                    f"a worker of the reward '{self._what}' did not start within {START_LIMIT_S:g} s{self._remedy}: "
                    f"{complaints.read().strip()[-500:] or 'it said nothing'}"
                )
        self.greeting = json.loads(line)
        return self._process

    def _line(self, process: subprocess.Popen[str], limit_s: float) -> str:
        assert process.stdout is not None, "it is a pipe"
        return process.stdout.readline() if wait([process.stdout.fileno()], limit_s) else ""
