"""What a process of the sandbox does: close itself in, run one program, report. Standard library only."""

from __future__ import annotations

import atexit
import builtins
import json
import os
import sys
import threading
import types
from typing import Any

from whet.rewards.sandbox import jail, syscalls
from whet.rewards.sandbox.values import encode

REPORT = 3
"""The descriptor that results are written to."""
OPEN_FILES = 32
THREADS = 64
_EXCERPT = 300


def run(
    question: dict[str, Any], descriptors: tuple[int, int, int, int], filtered: bytes | None, own_ids: bool
) -> None:
    """Run the program of a question and end this process. Never returns.

    `descriptors` become input, output, complaints and report; all others are closed. `filtered` is the filter of
    system calls. With `own_ids` this user has no processes elsewhere, so that threads can be counted.
    """
    code = 1
    try:
        os.setsid()
        for wanted, descriptor in enumerate(descriptors):
            os.dup2(descriptor, wanted)
        os.closerange(len(descriptors), os.sysconf("SC_OPEN_MAX"))
        jail.limit(
            memory_bytes=question["memory_bytes"],
            cpu_s=int(question["timeout_s"]) + 1,
            files=OPEN_FILES,
            processes=THREADS if own_ids else None,
        )
        _renew_streams()
        if filtered is not None:
            syscalls.install(filtered)
        code = _calls(question) if "calls" in question else _script(question["program"])
    except BaseException as error:  # whatever the program raised is its result
        _report({"error": _told(error)})
    finally:
        os._exit(code)


def _renew_streams() -> None:
    """Streams over the descriptors as they are now; what the server's own held is not ours."""
    sys.stdin = sys.__stdin__ = _stream(0, "r")
    sys.stdout = sys.__stdout__ = _stream(1, "w")
    sys.stderr = sys.__stderr__ = _stream(2, "w")
    sys.argv = ["answer.py"]


def _stream(descriptor: int, mode: str) -> Any:
    return open(descriptor, mode, encoding="utf-8", errors="replace", closefd=False)


def _script(program: str) -> int:
    """Run a program as if it were started by itself. Returns its exit code."""
    code = 0
    try:
        exec(compile(program, "answer.py", "exec"), _module("__main__"))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    return code


def _calls(question: dict[str, Any]) -> int:
    """Load a program as a module, then report the outcome of each call in a line of its own."""
    scope = _module("answer")
    exec(compile(question["program"], "answer.py", "exec"), scope)
    for call in question["calls"]:
        try:
            outcome = {"value": encode(_outcome(call, scope))}
        except Exception as error:
            outcome = {"error": _told(error)}
        _report({"nonce": question["nonce"], **outcome})
    return 0


def _outcome(call: dict[str, Any], scope: dict[str, Any]) -> Any:
    if "function" in call:
        return _function(call["function"], scope)(*call["arguments"])
    if "expression" in call:
        return eval(compile(call["expression"], "test.py", "eval"), scope)
    exec(compile(call["statements"], "test.py", "exec"), scope)
    return True


def _function(name: str, scope: dict[str, Any]) -> Any:
    """A function of the program, or a method of its class Solution."""
    if name not in scope and "Solution" in scope:
        return getattr(scope["Solution"](), name)
    return scope[name]


def _module(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module.__dict__


def _report(outcome: dict[str, Any]) -> None:
    data = (json.dumps(outcome) + "\n").encode()
    while data:
        data = data[os.write(REPORT, data) :]


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error!s:.{_EXCERPT}}"
