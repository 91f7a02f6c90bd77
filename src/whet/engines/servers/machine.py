"""The machine that a server's process runs on: this one, or one that a cluster lends."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from whet.engines.servers.process import Process, free_port


class Running(Protocol):
    """A server's process, wherever it runs."""

    @property
    def ended(self) -> str | None:
        """How it has ended, None while it runs; known at once."""
        ...

    def tail(self) -> str:
        """The end of its log, and where the rest is."""
        ...

    def end(self) -> None:
        """End it and all that it started. Blocks for some seconds at most."""
        ...


class Machine(Protocol):
    """Where one server runs, one process after the other. Every call has a limit, and raises EngineError after it."""

    is_here: bool
    """Whether servers see the disk and the memory of this machine."""

    async def place(self) -> tuple[str, int]:
        """The address at which a server is reached there, and a port that nobody listens on."""
        ...

    async def start(
        self, python: str | None, arguments: Sequence[str], environment: Mapping[str, str], log: Path, name: str
    ) -> Running:
        """Start a server with this Python, that of the machine when not given."""
        ...


class Here:
    """This machine; `devices` are the GPUs that the server sees, all when not given."""

    is_here = True

    def __init__(self, devices: str | None = None) -> None:
        self._devices = devices

    async def place(self) -> tuple[str, int]:
        return "127.0.0.1", free_port()

    async def start(
        self, python: str | None, arguments: Sequence[str], environment: Mapping[str, str], log: Path, name: str
    ) -> Process:
        visible = {} if self._devices is None else {"CUDA_VISIBLE_DEVICES": self._devices}
        # In this thread, that of the engine: the process is to end when it does.
        return Process(python or sys.executable, arguments, {**environment, **visible}, log, name)
