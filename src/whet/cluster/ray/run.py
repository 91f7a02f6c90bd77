"""A run on a Ray cluster as whoever started it sees it: nodes reserved, ranks watched, and begun again after a loss."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from whet.cluster.child import Piece
from whet.cluster.lent import Lent, Slot
from whet.cluster.placement import Plan, plan, shortage
from whet.cluster.ray.connection import Lost, connected, nodes
from whet.cluster.ray.crew import Crew, Group
from whet.cluster.recovery import INTERRUPTED, LOST, USERS, Outcome, supervise
from whet.config.run import RunConfig
from whet.errors import ClusterError
from whet.ranks.launch import GRACE_S, how_it_ended

logger = logging.getLogger(__name__)


def launch(config: RunConfig, command: Sequence[str]) -> int:
    """Run `whet COMMAND` as the ranks that the configuration asks for, on the nodes of its cluster, until it is over.

    What the ranks say is said here. Returns the exit code of rank 0. Raises ClusterError where the cluster cannot be
    reached, or has not what the run asks for within `cluster.start_timeout_s`. When a rank is lost, this is told, and
    the run begun again, `cluster.max_restarts` times. The first SIGINT or SIGTERM ends the run in order, a second one
    at once.
    """
    assert config.cluster.address is not None, "there is a cluster to run on"
    namespace = f"whet-{os.getpid()}-{time.time_ns()}"
    with connected(config.cluster.address, namespace):
        asked = plan(config, has_gpus=any(node.resources.get("GPU") for node in nodes()))
        run = _Run(config, asked, list(command))
        with run.hearing_signals():
            return supervise(run.attempt, config.cluster.max_restarts, run.pause)


class _Run:
    """One attempt after the other."""

    def __init__(self, config: RunConfig, asked: Plan, command: list[str]) -> None:
        self._config, self._asked, self._command = config, asked, command
        self._signals: list[int] = []
        self._passed_on = 0

    @contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM are noted, to be passed on."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, lambda number, _: self._signals.append(number))
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def pause(self, seconds: float) -> None:
        """Wait, unless a signal comes."""
        deadline = time.monotonic() + seconds
        while not self._signals and time.monotonic() < deadline:
            time.sleep(0.1)

    def attempt(self, restarts: int) -> Outcome:
        """Reserve nodes, start all ranks, and see them through to their end."""
        self._passed_on = len(self._signals)
        limit = time.monotonic() + self._config.cluster.start_timeout_s
        with self._reserved(limit) as groups:
            if groups is None:
                return Outcome(interrupted=True)
            try:
                crew = Crew(self._config, self._asked, groups[0], limit)
                try:
                    crew.start(self._command, restarts, self._lent(groups[1:]))
                    return self._watch(crew)
                finally:
                    crew.end()
            except Lost as error:
                return Outcome(lost=[str(error)], interrupted=bool(self._signals))

    @contextmanager
    def _reserved(self, limit: float) -> Iterator[list[Group] | None]:
        """Bundles for those that train, and for engines; None where a signal comes first. Raises ClusterError.

        Whoever is in them at the end is ended.
        """
        asked, groups = self._asked, list[Group]()
        kinds = [(asked.training, "STRICT_SPREAD" if asked.apart else "PACK"), (asked.engines, "SPREAD")]
        try:
            for bundles, strategy in kinds:
                if bundles:
                    name = f"whet-{time.time_ns()}"
                    held = placement_group([one.resources for one in bundles], strategy=strategy, name=name)
                    groups.append(Group(name, held))
                    if not self._await(groups[-1], limit):
                        yield None
                        return
            yield groups
        finally:
            for group in groups:
                remove_placement_group(group.held)

    def _lent(self, groups: Sequence[Group]) -> Lent:
        """What rank 0 is told of the cluster: room for the engines that have bundles of their own."""
        context, engines = ray.get_runtime_context(), self._asked.engines
        slots = [Slot(group.name, i, one.cpus, one.gpus) for group in groups for i, one in enumerate(engines)]
        limit_s = self._config.cluster.start_timeout_s
        return Lent(context.gcs_address, context.namespace, limit_s, tuple(slots))

    def _await(self, group: Group, limit: float) -> bool:
        tell = time.monotonic() + 5.0
        while not self._signals:
            if group.held.wait(1.0):
                return True
            if time.monotonic() > limit:
                raise ClusterError(
                    f"{shortage(self._asked, nodes())}. Waited {self._config.cluster.start_timeout_s:g} s "
                    "(cluster.start_timeout_s); ask for less, add nodes, or see what else runs there (ray status)"
                )
            if time.monotonic() > tell:
                logger.warning("waiting for nodes: %s", shortage(self._asked, nodes()))
                tell = float("inf")
        return False

    def _watch(self, crew: Crew) -> Outcome:
        """Pass on what the ranks say until all have ended, or one has failed and the others have had their time."""
        outcome, deadline = Outcome(), float("inf")
        while crew.listening and time.monotonic() < deadline:
            self._pass_on(crew)
            if self._passed_on > 1:  # at once, but with time to say a last word
                deadline = min(deadline, time.monotonic() + GRACE_S)
            for rank, said, code, why in crew.hear():
                _say(said)
                if why is not None:
                    outcome.lost.append(why)
                if code is not None:
                    outcome.codes[rank] = code
                    if code not in (0, USERS, INTERRUPTED, LOST):
                        outcome.lost.append(f"{crew.name(rank)} {how_it_ended(code)}")
                if why is not None or code or (code is not None and rank == 0):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if outcome.codes.get(0) != 0 and not outcome.lost:
            outcome.lost = [f"{crew.name(rank)} did not end within {GRACE_S:g} s" for rank in crew.listening.values()]
        outcome.interrupted = bool(self._signals)
        return outcome

    def _pass_on(self, crew: Crew) -> None:
        while self._passed_on < len(self._signals):
            number = self._signals[self._passed_on]
            self._passed_on += 1
            crew.signal(number if self._passed_on < 3 else signal.SIGKILL, everybody=self._passed_on > 1)


def _say(said: Sequence[Piece]) -> None:
    for stream, piece in said:
        target = sys.stdout if stream == "out" else sys.stderr
        target.buffer.write(piece)
        target.flush()
