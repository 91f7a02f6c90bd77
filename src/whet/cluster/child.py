"""A process whose output is read piece by piece, and that does not outlive the one that started it. Standard library
only."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Literal

Stream = Literal["out", "err"]
Piece = tuple[Stream, bytes]

PIECE_BYTES = 1 << 16
MAX_PIECES = 256
"""Pieces that wait to be read; beyond it the process waits to say more."""
REST_S = 2.0
"""Seconds for the rest of the output after the end of the process: what it started may still hold the pipes."""

# Runs first, in place of the program: the kernel then kills it with the thread that started it. That thread may have
# blocked signals, which would be blocked for the program too.
_TIED = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
    "signal.pthread_sigmask(signal.SIG_SETMASK, []); signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


class Child:
    """A program that runs. Raises OSError when it cannot be started."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: str) -> None:
        tied = [sys.executable, "-c", _TIED, str(os.getpid())] if sys.platform == "linux" else []
        self._arguments = [*tied, *command]
        self._options = {"env": dict(environment), "cwd": folder}
        self._pieces: queue.Queue[Piece] = queue.Queue(MAX_PIECES)
        self._readers: list[threading.Thread] = []
        self._started: queue.Queue[subprocess.Popen[bytes] | OSError] = queue.Queue(1)
        # A thread of its own that lives as long as the process: with the thread that starts it, the process is ended.
        threading.Thread(target=self._run, name="whet-child", daemon=True).start()
        started = self._started.get()
        if isinstance(started, OSError):
            raise started
        self._process = started
        self._ended: float | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def listen(self, seconds: float) -> tuple[list[Piece], int | None]:
        """What it has said since the last call, waited for so long at most, and its exit code once all is said."""
        said: list[Piece] = []
        deadline = time.monotonic() + seconds
        while not said and (left := deadline - time.monotonic()) > 0:
            if (code := self._code()) is not None and self._pieces.empty():
                return said, code
            self._take(said, min(left, 0.1))
        while not self._pieces.empty():
            self._take(said, 0.0)
        return said, None

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens where it has ended."""
        self._process.send_signal(number)

    def end(self) -> None:
        """Kill it, and return once it is gone."""
        self._process.kill()
        self._process.wait()

    def _take(self, said: list[Piece], seconds: float) -> None:
        try:
            said.append(self._pieces.get(timeout=seconds) if seconds else self._pieces.get_nowait())
        except queue.Empty:
            return

    def _code(self) -> int | None:
        """The exit code, once nothing more is to be expected."""
        code = self._process.poll()
        if code is None:
            return None
        self._ended = self._ended or time.monotonic()
        is_over = not any(reader.is_alive() for reader in self._readers)
        return code if is_over or time.monotonic() - self._ended > REST_S else None

    def _run(self) -> None:
        try:
            process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                **self._options,
            )
        except OSError as error:
            self._started.put(error)
            return
        assert process.stdout is not None and process.stderr is not None, "both are pipes"
        streams: list[tuple[Stream, IO[bytes]]] = [("out", process.stdout), ("err", process.stderr)]
        for name, stream in streams:
            reader = threading.Thread(target=self._read, args=(name, stream), name=f"whet-{name}", daemon=True)
            reader.start()
            self._readers.append(reader)
        self._started.put(process)
        process.wait()

    def _read(self, name: Stream, stream: IO[bytes]) -> None:
        while piece := os.read(stream.fileno(), PIECE_BYTES):
            self._pieces.put((name, piece))
