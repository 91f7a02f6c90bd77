"""The sandbox's server: starts a process for each program, watches over it, and hands back what it said.

It reads one JSON question per line and answers with one JSON line. It is a process of its own, with the standard
library only: the programs are forks of it, so that one starts in milliseconds and inherits nothing of a run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time
from typing import Any

from whet.rewards.sandbox import child, jail, syscalls

EVERYDAY = """
abc array bisect calendar cmath collections.abc contextlib copy dataclasses datetime decimal enum fractions functools
hashlib heapq io itertools json math numbers operator queue random re statistics string struct textwrap threading time
traceback types typing unicodedata
"""
"""Modules that programs find loaded."""
SEALED_IN = """
ast asyncio base64 binascii bz2 colorsys concurrent.futures csv ctypes difflib doctest email.message graphlib gzip hmac
html.parser inspect ipaddress keyword locale logging lzma pickle pprint secrets selectors shlex tokenize unittest.mock
urllib.parse uuid warnings weakref xml.etree.ElementTree zlib zoneinfo
"""
"""Further ones where no file can be opened any more."""
PROBE = """
import os, sys
def refused(deed):
    try:
        deed()
    except (OSError, RuntimeError):
        return True
    return False
deeds = {
    "open a file": lambda: open("/etc/passwd"),
    "list the processes": lambda: os.listdir("/proc"),
    "write a file": lambda: open("/tmp/whet-sandbox-probe", "w"),
    "open a connection": lambda: __import__("socket").socket(),
    "start a process": lambda: os.fork() or os._exit(0),
    "signal its parent": lambda: os.kill(os.getppid(), 0),
}
done = [name for name, deed in deeds.items() if not refused(deed)]
done += ["see the environment"] if not all(name.endswith("_NUM_THREADS") for name in os.environ) else []
"""
"""A program that tries what no program may do."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""All that is left of the environment: numpy would ask for the memory of a thread per processor."""
_READ_BYTES = 1 << 16
_PAUSE_S, _CLOSED_PAUSE_S = 0.02, 0.001


def main(isolation: str) -> None:
    """Serve until standard input ends. `isolation` is one of jail.ISOLATIONS, `auto` for the strongest, or `none`."""
    questions, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    os.environ.clear()
    os.environ.update(ONE_THREAD)
    for name in EVERYDAY.split():
        importlib.import_module(name)
    entered, refused = ("none", {}) if isolation == "none" else enter(isolation)
    if entered == "namespaces":
        follow_first_child()
    if entered is not None and entered != "none":
        jail.drop_capabilities()
    server = Server(entered, null)
    fault = server.fault() if entered is not None and entered != "none" else None
    print(json.dumps({"isolation": entered, "refused": refused, "fault": fault}), file=answers, flush=True)
    gc.freeze()
    for line in questions:
        print(json.dumps(server.answer(json.loads(line))), file=answers, flush=True)


def enter(isolation: str) -> tuple[str | None, dict[str, str]]:
    """The isolation that was entered, None without any, and why each that was tried before it could not be."""
    if (reason := syscalls.supported() or no_filter()) is not None:
        return None, {"seccomp": reason}
    refused: dict[str, str] = {}
    folders = jail.readable_folders()
    for name in jail.ISOLATIONS if isolation == "auto" else (isolation,):
        try:
            if name == "sealed":
                for module in SEALED_IN.split():
                    importlib.import_module(module)
            jail.ISOLATIONS[name](folders)
            return name, refused
        except OSError as error:
            refused[name] = str(error)
    return None, refused


def no_filter() -> str | None:
    """Why a process cannot filter its system calls here, or None: another one has tried it."""
    told, tells = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            syscalls.install(syscalls.program(files=True))
        except OSError as error:
            os.write(tells, str(error).encode())
        finally:
            os._exit(0)
    os.close(tells)
    os.waitpid(pid, 0)
    with os.fdopen(told) as reasons:
        return reasons.read() or None


def follow_first_child() -> None:
    """Go on as the first process of the new process table; the one outside waits for its end."""
    pid = os.fork()
    if pid == 0:
        jail.die_with_parent()
        return
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)


class Server:
    """Runs programs one after the other, each in a process of its own."""

    def __init__(self, isolation: str | None, null: int) -> None:
        self._own_ids = isolation == "namespaces"
        filtered = isolation is not None and isolation != "none"
        self._filter = syscalls.program(files=isolation != "sealed") if filtered else None
        self._null = null

    def fault(self) -> str | None:
        """What a program can do in here that it must not, or None."""
        question = {"program": PROBE, "calls": [{"expression": "', '.join(done)"}]}
        limits = {"nonce": "", "timeout_s": 10.0, "memory_bytes": 1 << 30, "output_bytes": 1 << 16}
        outcome = self.answer({**question, "stdin": "", **limits})
        if json.loads(outcome["report"] or "{}").get("value") == "":
            return None
        return f"a program that tried what none may do was not stopped: {outcome}"

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Run one program: what it wrote and reported, how it ended, and the seconds that it took."""
        start = time.monotonic()
        given = _input(question["stdin"].encode("utf-8", "replace"))
        output, written = os.pipe()
        report, reported = os.pipe()
        pid = os.fork()
        if pid == 0:
            child.run(question, (given, written, self._null, reported), self._filter, self._own_ids)
        for descriptor in (given, written, reported):
            os.close(descriptor)
        watch = Watch(pid, (output, report), start + question["timeout_s"], question["output_bytes"])
        ended = watch.until_the_end()
        written_text, reported_text = watch.texts()
        seconds = time.monotonic() - start
        return {"output": written_text, "report": reported_text, "ended": ended, "wall_s": seconds}


class Watch:
    """Reads what a process writes, within limits of time and size, and kills it where it goes beyond them."""

    def __init__(self, pid: int, pipes: tuple[int, int], deadline: float, most_bytes: int) -> None:
        self._pid, self._deadline, self._most_bytes = pid, deadline, most_bytes
        self._read = {pipe: bytearray() for pipe in pipes}
        self._open = set(pipes)

    def until_the_end(self) -> str:
        """How the process ended: `exit N`, `signal N`, or, where it was killed, `timeout` or `output`."""
        broken, status = "", None
        while status is None:
            self._take(_PAUSE_S)
            pid, now = os.waitpid(self._pid, os.WNOHANG)
            status = now if pid else None
            broken = broken or self._broken()
            if broken and status is None:
                os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # what it started, where it could
            os.killpg(self._pid, signal.SIGKILL)
        self._take(0.0)
        code = os.waitstatus_to_exitcode(status)
        return broken or self._broken(late=False) or (f"exit {code}" if code >= 0 else f"signal {-code}")

    def texts(self) -> list[str]:
        """What was read of each pipe, which is closed."""
        for pipe in self._read:
            os.close(pipe)
        return [data.decode("utf-8", "replace") for data in self._read.values()]

    def _broken(self, late: bool = True) -> str:
        """Which limit the process has broken."""
        if any(len(data) > self._most_bytes for data in self._read.values()):
            return "output"
        return "timeout" if late and time.monotonic() > self._deadline else ""

    def _take(self, wait_s: float) -> None:
        """Read what is there, or wait a little for something."""
        if not self._open:  # it is about to end, or has closed its output and goes on
            time.sleep(min(wait_s, _CLOSED_PAUSE_S))
            return
        while self._open:
            ready, _, _ = select.select(list(self._open), [], [], wait_s)
            for pipe in ready:
                data = os.read(pipe, _READ_BYTES)
                self._read[pipe] += data
                if not data:
                    self._open.discard(pipe)
            if not ready or wait_s or self._broken(late=False):
                return


def _input(data: bytes) -> int:
    """A file that holds these bytes and has no name, at its beginning."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("input")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


if __name__ == "__main__":
    main(sys.argv[1])
