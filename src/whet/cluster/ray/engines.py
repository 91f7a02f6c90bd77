"""Engines on nodes of a Ray cluster: an actor in a bundle of the run holds a server's process."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from whet.cluster import machine
from whet.cluster.lent import Lent, Slot
from whet.cluster.ray.connection import Lost, ask, first_line, joined, nodes
from whet.cluster.ray.member import Place
from whet.engines.servers.process import GRACE_S, OURS, Process, tail
from whet.errors import EngineError

logger = logging.getLogger(__name__)

ASK_S = 60.0
MOVES, MOVE_S = 3, 2.0
"""How often an actor that is lost as soon as it starts is started again at once, and the seconds before that."""
SOURCE = str(Path(__file__).resolve().parents[3])
"""Where whet lies on this machine; on another it may lie elsewhere."""


class Holder:
    """An actor that holds a server's process, and dies with it."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._over = threading.Event()

    def place(self) -> Place:
        return Place.here()

    def free_port(self) -> int:
        return machine.free_port()

    def run(
        self,
        python: str | None,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: str,
        name: str,
        source: str,
    ) -> str:
        """Start the server and see it through. Returns how it ended."""
        inherited = machine.inherited(os.environ) | {
            key: value.replace(source, SOURCE) for key, value in environment.items()
        }
        # The process is tied to the thread that starts it: this one, which waits for it.
        self._process = Process(python or sys.executable, arguments, inherited, Path(log), name)
        while (ended := self._process.ended) is None:
            self._over.wait(0.1)
        return ended

    def end(self) -> None:
        """End the server and all that it started."""
        if self._process is not None:
            self._process.end()


class Node:
    """The machine of one engine (see `engines.servers.machine.Machine`): whichever node its bundle is on.

    When that node is lost, Ray moves the bundle to another one with room, if there is any.
    """

    is_here = False

    def __init__(self, group: PlacementGroup, slot: Slot, limit_s: float, name: str) -> None:
        self._group, self._slot, self._limit_s, self._name = group, slot, limit_s, name
        self._holder: Any = None
        self._place: Place | None = None

    async def place(self) -> tuple[str, int]:
        return await asyncio.to_thread(self._find)

    async def start(
        self, python: str | None, arguments: Sequence[str], environment: Mapping[str, str], log: Path, name: str
    ) -> Held:
        given = {key: value for key, value in machine.portable(os.environ).items() if key not in OURS}
        given |= environment
        if self._slot.devices is not None:
            given["CUDA_VISIBLE_DEVICES"] = self._slot.devices
        assert self._holder is not None and self._place is not None, "a place has been found"
        over = self._holder.run.remote(python, list(arguments), given, str(log), name, SOURCE)
        return Held(self._holder, self._place, over, log)

    def _find(self) -> tuple[str, int]:
        deadline, moves = time.monotonic() + self._limit_s, 0
        while True:
            try:
                return self._settle(deadline - time.monotonic())
            except Lost as error:  # for a moment after the loss of a node, Ray still offers its bundles
                moves += 1
                if moves > MOVES or time.monotonic() + MOVE_S > deadline:
                    raise EngineError(f"{error}; see ray status for nodes with room") from error
            time.sleep(MOVE_S)

    def _settle(self, limit_s: float) -> tuple[str, int]:
        """A new actor in the bundle, wherever that is by now. Raises Lost."""
        if self._holder is not None:
            with suppress(RayError):
                ray.kill(self._holder)
        options: dict[str, Any] = {"num_cpus": self._slot.cpus, "num_gpus": self._slot.gpus, "max_restarts": 0}
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, self._slot.bundle)
        self._holder = ray.remote(**options)(Holder).options(max_concurrency=4).remote()
        self._place = ask("to start", {self._name: self._holder.place.remote()}, limit_s)[0]
        port = ask("for a port", {self._name: self._holder.free_port.remote()}, ASK_S)[0]
        logger.info("%s is on node %s (%s)", self._name, self._place.address, self._place.node[:8])
        return self._place.address, port


class Held:
    """A server's process that an actor holds (see `engines.servers.machine.Running`)."""

    def __init__(self, holder: Any, place: Place, over: Any, log: Path) -> None:
        self._holder, self._place, self._over, self._log = holder, place, over, log

    @property
    def ended(self) -> str | None:
        if not ray.wait([self._over], timeout=0)[0]:
            return None
        try:
            return ray.get(self._over, timeout=ASK_S)
        except RayError as error:
            if not any(node.id == self._place.node for node in nodes()):
                return f"is lost: node {self._place.address} ({self._place.node[:8]}) is gone"
            return f"is lost with its actor ({first_line(error)})"

    def tail(self) -> str:
        return tail(self._log)

    def end(self) -> None:
        with suppress(Lost, RayError):
            ask("to end its server", {"an engine": self._holder.end.remote()}, 3 * GRACE_S)
        with suppress(RayError):
            ray.kill(self._holder)


def machines(lent: Lent) -> list[Node]:
    """The machines of a run's engines. Raises ClusterError where the cluster cannot be joined any more."""
    joined(lent.address, lent.namespace)
    groups = {name: ray.util.get_placement_group(name) for name in {slot.group for slot in lent.slots}}
    return [
        Node(groups[slot.group], slot, lent.limit_s, f"the actor of engine {number}")
        for number, slot in enumerate(lent.slots)
    ]
