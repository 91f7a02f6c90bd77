"""A server's process: with a port and a log of its own, ended with all that it started, and never outliving us."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from whet.errors import EngineError

TAIL = 25
"""Lines of a log that an error shows."""
GRACE_S = 5.0
"""Seconds for a server to end by itself before it is killed."""

# Runs before the server does, in its place: the kernel then ends it with the thread that started it, which lives as
# long as the engine. It is one line of Python because a function could not be run safely between fork and exec.
_TIED = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "signal.pthread_sigmask(signal.SIG_SETMASK, []); "  # the thread that starts it may have blocked some
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)

# Waits for the end of a pipe that only we hold: it ends when we do, be it by SIGKILL. What the kernel sends to the
# server alone is not heard by one that is stopped, and not by what is left of one that has died.
_GUARD = (
    "import os, signal, sys, time\n"
    "sys.stdin.buffer.read()\n"
    "for number, pause in ((signal.SIGCONT, 0), (signal.SIGTERM, float(sys.argv[2])), (signal.SIGKILL, 0)):\n"
    "    try: os.killpg(int(sys.argv[1]), number)\n"
    "    except OSError: break\n"
    "    time.sleep(pause)\n"
)


class Process:
    """One server with its log. Raises EngineError when it cannot be started at all."""

    def __init__(self, python: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path, name: str):
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        inherited = {key: value for key, value in os.environ.items() if key not in OURS}
        command = [python, "-c", _TIED, str(os.getpid()), python, *arguments]
        try:
            with log.open("ab") as file:
                file.write(f"$ {python} {' '.join(arguments)}\n".encode())
                file.flush()
                self._process = subprocess.Popen(
                    command if sys.platform == "linux" else [python, *arguments],
                    env={**inherited, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise EngineError(f"{name} cannot be started with {python}: {error}; set engine.python") from error
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(self._process.pid), str(GRACE_S)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> str | None:
        """How the process has ended; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"

    def tail(self) -> str:
        """The end of the log, and where the rest is."""
        return tail(self.log)

    def end(self) -> None:
        """End the process and all that it started, gently first. Blocks for a few seconds at most."""
        group = self._process.pid
        _signal_group(group, signal.SIGCONT)  # one that is stopped hears nothing else
        _signal_group(group, signal.SIGTERM)
        limit = time.monotonic() + GRACE_S
        while time.monotonic() < limit and self._process.poll() is None:
            time.sleep(0.05)
        _signal_group(group, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        self._guard.kill()
        self._guard.communicate()


OURS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "PYTHONPATH",
)
"""Variables of the trainer's own process group, and of its packages, which a server must not take for its own."""


def tail(log: Path) -> str:
    """The end of a server's log, and where the rest is."""
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").splitlines()
        return f"the end of its log ({log}):\n" + "\n".join(f"    {line}" for line in lines[-TAIL:])
    return f"its log was to be {log}"


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
