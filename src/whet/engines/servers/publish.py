"""New weights for all servers: sent, named by their version, checked, and at hand for a server that comes back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from whet.config.engine import PublishConfig
from whet.engines.servers.bridge import Bridge
from whet.engines.servers.fleet import Fleet
from whet.engines.servers.server import CONTROL_S, Server
from whet.engines.servers.transports import ByFile, Transport, adapter_folder
from whet.engines.servers.verify import Expected, Probe, ask, compare_sums, differences, judge, probe_prompt
from whet.errors import EngineError
from whet.weights.bits import Sums
from whet.weights.files import Written, to_dtype
from whet.weights.snapshot import Snapshot

logger = logging.getLogger(__name__)


class Publisher:
    """Brings snapshots to a fleet by one transport.

    `dtype` is what the servers hold weights in. `expected` gives the trainer's logprobs, to check with; `precise` says
    whether both sides compute in float32. `adapter` is the place and the configuration of an adapter where that alone
    is sent. `remedy` says what to do when a server does not compute with what it was given, `unlike` where it has read
    the model's folder `begun` by itself.
    """

    def __init__(
        self,
        fleet: Fleet,
        bridge: Bridge,
        config: PublishConfig,
        transport: Transport,
        *,
        dtype: torch.dtype | None,
        vocabulary: int,
        expected: Expected | None,
        precise: bool,
        adapter: tuple[Path, str] | None,
        remedy: str,
        begun: str | None,
        unlike: Callable[[], str],
    ) -> None:
        self._fleet, self._bridge, self._config, self._transport = fleet, bridge, config, transport
        self._dtype, self._expected, self._precise = dtype, expected, precise
        self._prompt, self._adapter, self._remedy = probe_prompt(vocabulary), adapter, remedy
        self._begun, self._unlike = begun, unlike
        self.version = 0
        self.published = 0
        self.busy = False
        self._verified = False
        self._sums: Sums | None = None
        self._adapter_now: tuple[str, Written] | None = None
        self._probes: dict[int, Probe] = {}
        self._metrics: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """Of the publishes since the last call: seconds, MiB, and how far a probe was from the trainer's logprobs."""
        found, self._metrics = self._metrics, {}
        return found

    async def publish(self, snapshot: Snapshot) -> None:
        """Bring a snapshot to every server that lives. Raises EngineError where one does not have it afterwards."""
        began = time.perf_counter()
        sums = Sums()
        await self._bridge.run(self._fleet.some_living())
        self.busy = True
        try:
            size = await self._send(snapshot, sums)
            self.version = snapshot.version
            await self._bridge.run(self._fleet.each(self._adopt))
            self.published += 1
        finally:
            self.busy = False
            await self._bridge.run(self._fleet.go_on())
        took = time.perf_counter() - began
        changed = self._sums is None or self._sums.groups != sums.groups
        self._sums = sums if sums.groups else self._sums
        self._metrics |= {"engine/publish_s": took, "engine/publish_mb": size / 2**20}
        logger.debug("published version %d: %.1f MiB in %.2f s", snapshot.version, size / 2**20, took)
        if self._config.verify == "always" or (self._config.verify == "first" and not self._verified):
            await self.verify(changed=changed)
            self._verified = True

    async def _send(self, snapshot: Snapshot, sums: Sums) -> int:
        if self._adapter is not None and snapshot.adapter is not None:
            return await self._send_adapter(snapshot)
        for last in (False, True):
            living = len(self._fleet.living)
            try:
                return await self._transport.send(self._counted(snapshot, sums), snapshot.version)
            except EngineError as error:
                left = len(self._fleet.living)
                if last or left == living or not left:
                    raise
                logger.warning("%s; the weights are sent once more to the %d engines that are left", error, left)
                sums.groups.clear()
        raise AssertionError("the last attempt returns or raises")

    def _counted(self, snapshot: Snapshot, sums: Sums) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in to_dtype(snapshot.tensors(), self._dtype):
            sums.add(name, tensor)
            yield name, tensor

    async def _send_adapter(self, snapshot: Snapshot) -> int:
        assert self._adapter is not None and snapshot.adapter is not None, "there is an adapter to send"
        place, config = self._adapter
        written = adapter_folder(place, to_dtype(snapshot.adapter(), self._dtype), config, snapshot.version)
        name = f"whet-{snapshot.version}-{self.published}"
        before, self._adapter_now = self._adapter_now, (name, written)
        await self._bridge.run(self._fleet.hold())
        await self._bridge.run(self._fleet.each(self._take_adapter))
        if before is not None:
            await self._bridge.run(self._fleet.each(lambda server: self._drop_adapter(server, before[0])))
        return written.size

    async def _take_adapter(self, server: Server) -> None:
        assert self._adapter_now is not None, "there is an adapter to take"
        name, written = self._adapter_now
        await server.dialect.load_adapter(server.channel, name, str(written.folder), self._config.timeout_s)
        server.adapter = name

    async def _drop_adapter(self, server: Server, name: str) -> None:
        """Requests that were begun with it have it; they end with it."""
        if not server.active:
            await server.dialect.unload_adapter(server.channel, name, CONTROL_S)

    async def _adopt(self, server: Server) -> None:
        """Everything has come: the server samples with it, and calls it by its version."""
        if self._adapter_now is None:
            await server.dialect.finish(server.channel, self.version, self._config.timeout_s)
        await self._name(server)
        if server.state == "stale":
            server.state = "ready"

    async def _name(self, server: Server) -> None:
        await server.dialect.label(server.channel, self.version, CONTROL_S)
        told = await server.dialect.version(server.channel, CONTROL_S)
        if told is not None and told != str(self.version):
            raise EngineError(
                f"{server.name} says that its weights are version {told!r} after version {self.version} was published; "
                "let no other run update this server"
            )
        server.version = self.version
        server.known[str(self.version)] = self.version
        for request in server.active.values():
            request.mark(self.version)

    async def restore(self, server: Server) -> bool:
        """Bring the current weights to a server that has come up; whether they could be had. Runs in the servers' loop.

        A server that was started has those of the model's folder, which are the policy's until the first publish.
        """
        while True:
            while self.busy:
                await asyncio.sleep(0.02)
            version, published = self.version, self.published
            if published:
                if self._adapter_now is not None:
                    await self._take_adapter(server)
                elif isinstance(self._transport, ByFile) and self._transport.last is not None:
                    await asyncio.to_thread(self._transport.for_newcomer)
                    await self._transport.load(server)
                    await server.dialect.finish(server.channel, version, self._config.timeout_s)
                else:
                    return False
            if not self.busy and (version, published) == (self.version, self.published):
                await self._name(server)
                return True

    async def verify(self, *, changed: bool = False) -> None:
        """Hold what servers compute, and the checksums of what they hold, against the trainer. Raises EngineError."""
        servers = self._fleet.living
        if self._sums is not None and self._adapter_now is None:
            held = await self._bridge.run(self._fleet.each(lambda s: s.dialect.bits(s.channel, self._config.timeout_s)))
            for server in servers:
                if server.dialect.checks_weights and (ranks := held.get(server.index)):
                    compared = compare_sums(server, self._sums, ranks, self._remedy)
                    self._metrics["engine/groups_checked"] = float(compared)
        if self._expected is None:
            return
        answers = await self._bridge.run(self._fleet.each(lambda server: ask(server, self._prompt)))
        why, did = self._remedy, f"taken in the weights of version {self.version}"
        if self._begun is not None and not self.published:
            why, did = self._unlike(), f"read {self._begun}"
        for server in servers:
            if (probe := answers.get(server.index)) is None:
                continue
            apart = differences(probe, self._prompt, self._expected)
            before = self._probes.get(server.index)
            judge(server, probe, apart, before, changed, self._precise, why, did)
            self._probes[server.index] = probe
            worst = max(apart[0], self._metrics.get("engine/probe_logprob_diff", 0.0))
            self._metrics["engine/probe_logprob_diff"] = worst

    def close(self) -> None:
        self._transport.close()
