"""The actors of one attempt at a run, each with a rank: started together, listened to, and ended."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from whet.cluster import machine
from whet.cluster.child import Piece
from whet.cluster.lent import LENT, Lent, Slot
from whet.cluster.placement import Plan
from whet.cluster.ray.connection import ask, first_line, nodes
from whet.cluster.ray.member import Member
from whet.config.run import RunConfig
from whet.errors import ClusterError
from whet.ranks.environment import ADDRESS, LOCAL_RANK, PORT, RANK, SIZE
from whet.ranks.launch import GRACE_S

logger = logging.getLogger(__name__)

ASK_S = 60.0
"""Seconds for an actor to answer what it knows at once."""
LISTEN_S = 2.0
"""Seconds that an actor waits for its rank to say something, before it answers that there was nothing."""
UNHEARD_S = 30.0
"""Seconds that a node may be out of reach before its ranks count as lost."""
SHARED_S = 30.0
"""Seconds until a file that one node has written must be there on the others."""


@dataclass(frozen=True)
class Group:
    """Bundles that are reserved, under a name that the run's other programs know."""

    name: str
    held: PlacementGroup


class Crew:
    """Ranks in the bundles of `group`, those on one node standing together: who shares a layer's matrices is near.

    Raises Lost where an actor does not start before `limit`, by the monotonic clock, or has died.
    """

    def __init__(self, config: RunConfig, asked: Plan, group: Group, limit: float) -> None:
        self._config, self._asked, self._group = config, asked, group
        self._pids: dict[int, int] = {}
        self._unheard: dict[int, float] = {}
        self.listening: dict[Any, int] = {}
        """Ranks that have not ended, by the answer that is awaited from each."""
        options: dict[str, Any] = {"num_cpus": config.cluster.cpus_per_process}
        options |= {"num_gpus": 1 if asked.training[0].gpus else 0, "max_restarts": 0, "max_concurrency": 4}
        found = []
        for index in range(len(asked.training)):
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group.held, index)
            found += [ray.remote(**options)(Member).remote() for _ in range(asked.per_bundle)]
        asking = {f"process {i} of {len(found)}": one.place.remote() for i, one in enumerate(found)}
        places = ask("to start", asking, max(1.0, limit - time.monotonic()))
        first = {place.node: number for number, place in reversed([*enumerate(places)])}
        order = sorted(range(len(found)), key=lambda number: first[places[number].node])
        self._members, self.places = [found[i] for i in order], [places[i] for i in order]
        self._bundles = [number // asked.per_bundle for number in order]

    def name(self, rank: int) -> str:
        """How messages call a rank."""
        place, pid = self.places[rank], self._pids.get(rank)
        return f"rank {rank} (node {place.address}, {place.host}{f', pid {pid}' if pid else ''})"

    def start(self, command: list[str], restarts: int, lent: Lent) -> None:
        """Start the process of every rank; engines have what is lent to them, and share the GPUs of ranks.

        Raises ClusterError where a node does not see the files of the run.
        """
        folder = self._folder()
        output = os.path.join(folder, self._config.output_dir)
        self._check_storage(output)
        if restarts and self._ask("for checkpoints", "has_checkpoint", output, ranks=[0])[0]:
            command = [*command, "--checkpoint.resume", "auto"]
        shared = machine.portable(os.environ) | {LENT: self._with_devices(lent).to_text()}
        shared |= {SIZE: str(len(self._members)), ADDRESS: self.places[0].address}
        shared[PORT] = str(self._ask("for a port", "free_port", ranks=[0])[0])
        shared.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # we say who is missing
        starting = {}
        for rank, member in enumerate(self._members):
            beside = [other for other, place in enumerate(self.places) if place.node == self.places[rank].node]
            own = {RANK: str(rank), LOCAL_RANK: str(beside.index(rank))}
            if gpus := self.gpus(rank):
                own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)  # each takes its own, and reaches those of its neighbours
            starting[self.name(rank)] = member.start.remote(command, shared | own, folder)
        self._pids = dict(enumerate(ask("to start", starting, ASK_S)))
        for rank in range(len(self._members)):
            self._listen(rank)
        told = "; ".join(f"rank {rank} on {place.address} ({place.node[:8]})" for rank, place in enumerate(self.places))
        logger.info("%d process(es) train: %s", len(self._members), told)

    def _with_devices(self, lent: Lent) -> Lent:
        """What is lent, with the GPUs that engines share with ranks: each those of as many ranks as it has GPUs."""
        asked, slots = self._asked, list(lent.slots)
        for engine in range(asked.colocated):
            first = engine * max(1, asked.devices_per_engine) % asked.size
            ranks = range(first, first + asked.devices_per_engine)
            devices = ",".join(gpu for rank in ranks for gpu in self.places[rank].gpus) or None
            slots.append(Slot(self._group.name, self._bundles[first], devices=devices))
        return replace(lent, slots=tuple(slots))

    def gpus(self, rank: int) -> list[str]:
        """The GPUs of this run on the node of a rank, those of its first rank first."""
        return [gpu for place in self.places if place.node == self.places[rank].node for gpu in place.gpus]

    def hear(self) -> list[tuple[int, list[Piece], int | None, str | None]]:
        """For each rank that has been heard of: what it said, its exit code if it has ended, and why it is lost."""
        done, _ = ray.wait(list(self.listening), num_returns=1, timeout=0.5)
        heard = []
        for ref in done:
            rank = self.listening.pop(ref)
            try:
                said, code = ray.get(ref, timeout=ASK_S)
            except ActorUnavailableError as error:  # it may come back
                since = self._unheard.setdefault(rank, time.monotonic())
                if self._is_alive(rank) and time.monotonic() - since < UNHEARD_S:
                    time.sleep(0.5)
                    self._listen(rank)
                else:
                    heard.append((rank, [], None, self._why(rank, error)))
            except RayError as error:
                heard.append((rank, [], None, self._why(rank, error)))
            else:
                self._unheard.pop(rank, None)
                if code is None:
                    self._listen(rank)
                heard.append((rank, said, code, None))
        return heard

    def signal(self, number: int, *, everybody: bool) -> None:
        """Send a signal to rank 0, or to all."""
        for member in self._members if everybody else self._members[:1]:
            member.signal.remote(number)

    def end(self) -> None:
        """End the processes that run; returns once they are gone, as far as their nodes can be reached."""
        ending = [self._members[rank].end.remote() for rank in self.listening.values()]
        if ending:
            ray.wait(ending, num_returns=len(ending), timeout=GRACE_S)

    def _listen(self, rank: int) -> None:
        self.listening[self._members[rank].listen.remote(LISTEN_S)] = rank

    def _ask(
        self, what: str, method: str, *arguments: Any, ranks: list[int] | None = None, limit_s: float = ASK_S
    ) -> list[Any]:
        ranks = [*range(len(self._members))] if ranks is None else ranks
        asked = {self.name(rank): getattr(self._members[rank], method).remote(*arguments) for rank in ranks}
        return ask(what, asked, limit_s)

    def _folder(self) -> str:
        """The folder that the ranks run in: the one of this process, which must be there on all nodes."""
        folder = os.getcwd()
        for rank, is_there in enumerate(self._ask("for the working folder", "has_folder", folder)):
            if not is_there:
                raise ClusterError(
                    f"node {self.places[rank].address} does not have the folder {folder}; start the run from a folder "
                    "that all nodes share, or with ray job submit --working-dir"
                )
        return folder

    def _check_storage(self, output: str) -> None:
        """Raises ClusterError where a node would not see the checkpoints that rank 0 writes."""
        first = {place.node: rank for rank, place in reversed([*enumerate(self.places)])}
        others = [rank for rank in first.values() if rank]
        if not others:
            return
        probe = os.path.join(output, f".probe-{os.getpid()}-{time.time_ns()}")
        made = self._ask("to write into output_dir", "leave", probe, ranks=[0])[0]
        found = self._ask("to read output_dir", "sees", probe, SHARED_S, ranks=others, limit_s=SHARED_S + ASK_S)
        self._ask("to remove a file", "clear", probe, made, ranks=[0])
        for rank, is_seen in zip(others, found, strict=True):
            if not is_seen:
                raise ClusterError(
                    f"output_dir is {self._config.output_dir!r}, but what node {self.places[0].address} writes there, "
                    f"node {self.places[rank].address} does not see; set it to a folder on storage that all nodes "
                    "share: a run goes on from there when a node is lost"
                )

    def _is_alive(self, rank: int) -> bool:
        """Whether the node of a rank is."""
        return any(node.id == self.places[rank].node for node in nodes())

    def _why(self, rank: int, error: Exception) -> str:
        deadline = time.monotonic() + 3.0  # the loss of a node is known a little later than that of its actors
        while self._is_alive(rank) and time.monotonic() < deadline:
            time.sleep(0.2)
        place = self.places[rank]
        if not self._is_alive(rank):
            return f"{self.name(rank)} is lost: node {place.address} ({place.node[:8]}) is gone"
        return f"{self.name(rank)} is lost: the actor that held it has died ({first_line(error)})"
