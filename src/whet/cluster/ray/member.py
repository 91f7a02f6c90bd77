"""An actor on some node that holds the process of one rank there."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from whet.cluster import machine
from whet.cluster.child import Child, Piece


@dataclass(frozen=True)
class Place:
    """Where an actor is, and the GPUs that are its own there."""

    node: str
    address: str
    host: str
    gpus: tuple[str, ...]

    @classmethod
    def here(cls) -> Place:
        context = ray.get_runtime_context()
        gpus = tuple(context.get_accelerator_ids().get("GPU", []))
        return cls(context.get_node_id(), ray.util.get_node_ip_address(), socket.gethostname(), gpus)


class Member:
    """A process, and what its node knows. Several calls run at a time, so that one may listen while another speaks."""

    def __init__(self) -> None:
        self._child: Child | None = None

    def place(self) -> Place:
        return Place.here()

    def free_port(self) -> int:
        return machine.free_port()

    def leave(self, probe: str) -> list[str]:
        return machine.leave(probe)

    def sees(self, probe: str, seconds: float) -> bool:
        return machine.sees(probe, seconds)

    def clear(self, probe: str, made: list[str]) -> None:
        machine.clear(probe, made)

    def has_folder(self, folder: str) -> bool:
        return os.path.isdir(folder)

    def has_checkpoint(self, folder: str) -> bool:
        return any(Path(folder).glob("checkpoint-*/complete.json"))

    def start(self, arguments: Sequence[str], given: Mapping[str, str], folder: str) -> int:
        """Start `python -m whet` with these arguments here. Returns its process id."""
        environment = machine.inherited(os.environ) | given
        source = str(Path(__file__).resolve().parents[3])
        paths = [source, given.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
        if (interface := machine.interface_of(ray.util.get_node_ip_address())) is not None:
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)  # a host's name often stands for another one
        self._child = Child([sys.executable, "-m", "whet", *arguments], environment, folder)
        return self._child.pid

    def listen(self, seconds: float) -> tuple[list[Piece], int | None]:
        """See `Child.listen`."""
        assert self._child is not None, "there is somebody to listen to"
        return self._child.listen(seconds)

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        if self._child is not None:
            self._child.signal(number)

    def end(self) -> None:
        """Kill the process, and return once it is gone."""
        if self._child is not None:
            self._child.end()
