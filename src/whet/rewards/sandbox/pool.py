"""The sandbox as whet sees it: programs go in, what they wrote and returned comes out."""

from __future__ import annotations

import atexit
import functools
import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import whet
from whet.errors import ConfigError
from whet.rewards.sandbox.values import decode
from whet.rewards.workers import WorkerPool

Isolation = Literal["auto", "namespaces", "landlock", "sealed", "none"]
MAX_SERVERS = 8
GRACE_S = 5.0
START = (
    "import sys; sys.path.insert(0, {root!r}); from whet.rewards.sandbox.server import main; "
    "sys.path.pop(0); main({isolation!r})"
)
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run of a program may use."""

    timeout_s: float = 10.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 4 << 20
    """Most bytes of output, and most of results."""


@dataclass(frozen=True, slots=True)
class Run:
    """How a program ended, and what it wrote.

    `ended` is `exit 0`, `exit N`, `signal N`, `timeout`, `output` (there was too much of it) or `lost` (the server
    went down with it). `results` has a value, or an Exception, for each call that was finished.
    """

    ended: str
    output: str = ""
    results: tuple[Any, ...] = ()
    error: str | None = None
    wall_s: float = 0.0


class Sandbox:
    """Runs Python programs where they can neither reach nor change anything, several at a time.

    Safe to use from any thread and event loop. A program has no network, no files but the interpreter's own, which
    it can read, no other processes, no environment, and limits of time, memory and output. See `jail.ISOLATIONS`
    for how; `auto` takes the strongest that this machine allows. `none` limits and separates only: it is for programs
    that can be trusted.
    Raises ConfigError, when it is made, if the isolation is not to be had here, or does not hold.
    """

    def __init__(self, isolation: Isolation = "auto", *, num_servers: int | None = None, python: str | None = None):
        root = str(Path(whet.__file__).parent.parent)
        command = [python or sys.executable, "-c", START.format(root=root, isolation=isolation)]
        self.num_servers = num_servers or min(MAX_SERVERS, os.cpu_count() or 1)
        self._pool = WorkerPool(command, self.num_servers, what="code", env=ENVIRONMENT, detached=True)
        self.isolation = self._agreed(isolation)
        """What the isolation is: `namespaces`, `landlock`, `sealed` or `none`."""

    async def run(self, program: str, stdin: str = "", limits: Limits = Limits()) -> Run:
        """Run a program that reads its input and writes its output."""
        return await self._ask({"program": program, "stdin": stdin}, limits)

    async def call(self, program: str, calls: Sequence[Mapping[str, Any]], limits: Limits = Limits()) -> Run:
        """Load a program and make calls, each of them {function, arguments}, {expression} or {statements}.

        A function may be a method of a class Solution. Statements have the value True if they raise nothing; they
        could be made to seem so by a program that reads its own stack, which values cannot.
        """
        nonce = secrets.token_hex(8)
        return await self._ask({"program": program, "stdin": "", "calls": list(calls), "nonce": nonce}, limits)

    def close(self) -> None:
        """End all processes."""
        self._pool.close()

    async def _ask(self, question: dict[str, Any], limits: Limits) -> Run:
        asked = {
            **question,
            "timeout_s": limits.timeout_s,
            "memory_bytes": limits.memory_bytes,
            "output_bytes": limits.output_bytes,
        }
        answer = await self._pool.ask(asked, limits.timeout_s + GRACE_S)
        if answer is None:
            return Run("lost")
        results, error = _results(answer["report"], question.get("nonce"))
        return Run(answer["ended"], answer["output"], results, error, answer["wall_s"])

    def _agreed(self, isolation: Isolation) -> str:
        """The isolation that the first server found. Raises ConfigError unless it holds."""
        found = self._pool.greeting()
        if found["isolation"] is not None and found["fault"] is None:
            return found["isolation"]
        self.close()
        if found["fault"] is not None:
            raise ConfigError(f"the sandbox for code does not hold ({found['isolation']}): {found['fault']}")
        tried = "; ".join(f"{name}: {reason}" for name, reason in found["refused"].items())
        raise ConfigError(
            f"there is no sandbox for code on this machine with isolation {isolation!r} ({tried}); use isolation auto, "
            "run on Linux where seccomp is allowed (containers: the default profile of Docker will do), or, only if "
            "you trust whatever the model may write, set isolation: none"
        )


@functools.cache
def shared_sandbox(isolation: Isolation = "auto") -> Sandbox:
    """The sandbox of this process, started at its first use."""
    sandbox = Sandbox(isolation)
    atexit.register(sandbox.close)
    return sandbox


class ProgramError(Exception):
    """What a call raised in the sandbox."""


def _results(report: str, nonce: str | None) -> tuple[tuple[Any, ...], str | None]:
    """The results that bear the nonce, and the error that ended the program. What else was written is ignored."""
    results: list[Any] = []
    error = None
    for line in report.splitlines():
        try:
            outcome = json.loads(line)
            if nonce is not None and outcome.get("nonce") == nonce:
                results.append(decode(outcome["value"]) if "value" in outcome else ProgramError(str(outcome["error"])))
            elif "error" in outcome:
                error = str(outcome["error"])
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            continue
    return tuple(results), error
