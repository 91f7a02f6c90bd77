"""The engine that is servers: what the rollout side sees of them (see `engines.protocol.Engine`)."""

from __future__ import annotations

import asyncio
import atexit
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from whet.config.engine import EngineConfig
from whet.engines.local.request import validate
from whet.engines.servers.bridge import Bridge
from whet.engines.servers.dialect import Dialect, Start
from whet.engines.servers.fleet import Fleet
from whet.engines.servers.machine import Here, Machine
from whet.engines.servers.publish import Publisher
from whet.engines.servers.request import Request
from whet.engines.servers.router import Router
from whet.engines.servers.server import CONTROL_S, Server
from whet.engines.servers.transports import ByBroadcast, ByFile, ByHandle, Transport
from whet.engines.servers.verify import Expected, why_unlike
from whet.errors import EngineError
from whet.types import Completion, Sampling
from whet.weights.files import WeightFolder, place_for
from whet.weights.snapshot import Snapshot
from whet.weights.stamp import Stamp

logger = logging.getLogger(__name__)

TELL_S = 30.0
"""Seconds between two lines that say that servers are still starting."""


@dataclass(frozen=True)
class Served:
    """What servers are to sample from, and what is known of it.

    `model` is the folder of the weights that they begin with, `read` its files as the trainer read them;
    `holds_current` says whether these are the policy's now, and `snapshot` gives what is, by the version that it is to
    have. `expected` gives the trainer's own logprobs to check against, `precise` says whether both sides compute in
    float32. `stands_still` says that the policy does not change while completions are sampled. `adapter` is peft's
    configuration of an adapter, and `adapter_rank` its rank, where one is trained on what the folder holds and sent
    alone. `machines` are those that a cluster lends, one for each server; without them servers run on this one.
    """

    model: str
    dtype: str
    vocabulary: int
    num_bytes: int
    stop_token_ids: tuple[int, ...] = ()
    max_positions: int | None = None
    tokenizer: Any = None
    output_dir: Path = Path()
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precise: bool = True
    holds_current: Callable[[], bool] = lambda: True
    snapshot: Callable[[int], Snapshot] | None = None
    expected: Expected | None = None
    stands_still: bool = True
    colocated: bool = False
    first_device: int = 0
    machines: Sequence[Machine] = ()
    adapter: str | None = None
    adapter_rank: int | None = None
    read: Stamp = field(default_factory=dict)


class ServerEngine:
    """Completions from servers of one kind, started here or found at `engine.address`.

    Servers start with the first use. Their loop is a thread of its own, so that they are watched while the trainer
    computes; every method may be called from any event loop, weights excepted: those come from where the trainer is.
    """

    def __init__(self, dialect: Dialect, config: EngineConfig, served: Served, remedy: Callable[[bool], str]) -> None:
        self._config, self._served, self._dialect = config, served, dialect
        self._bridge = Bridge(f"whet {dialect.name} servers")
        self._router = Router(config, served.output_dir / "engines") if config.router == "sglang-router" else None
        self._fleet = Fleet(self._servers(), config, frozenset(served.stop_token_ids), self._restore, self._router)
        adapter, told = self._adapter(), remedy(config.address is not None)
        self._publisher = Publisher(
            self._fleet,
            self._bridge,
            config.publish,
            self._transport(),
            dtype=getattr(torch, served.dtype, None),
            vocabulary=served.vocabulary,
            expected=served.expected,
            precise=served.precise,
            adapter=adapter,
            remedy=told,
            begun=served.model if config.address is None else None,
            unlike=lambda: why_unlike(served.model, served.read, told),
        )
        self._closed = self._asleep = False
        self._began = time.monotonic()
        self._started: asyncio.Future[None] | None = None
        self._starting = asyncio.run_coroutine_threadsafe(self._start(), self._bridge.loop)
        self._first = True
        self._early: set[Request] = set()
        """Requests that wait for the servers to come up."""
        self._gate = asyncio.Lock()
        self._gate_loop: asyncio.AbstractEventLoop | None = None
        self._caller: asyncio.AbstractEventLoop | None = None
        self._rescuing: set[asyncio.Task[None]] = set()
        atexit.register(self._abandon)

    # --- what it is made of -------------------------------------------------------------------------------

    def _servers(self) -> list[Server]:
        config, served = self._config, self._served
        start = Start(
            served.model,
            served.dtype,
            config.max_concurrent,
            served.seed,
            served.device.type,
            served.adapter_rank if self._sends_adapter else None,
        )
        logs = served.output_dir / "engines"
        addresses = [config.address] if isinstance(config.address, str) else config.address
        if addresses is not None:
            return [Server(i, self._dialect, config, start, logs, address=one) for i, one in enumerate(addresses)]
        found = []
        for index in range(config.num_engines):
            machine = served.machines[index] if served.machines else Here(self._devices(index))
            found.append(Server(index, self._dialect, config, start, logs, machine=machine))
        return found

    def _devices(self, index: int) -> str | None:
        """The GPUs of this machine that a server has to itself, or shares with the trainer."""
        if self._served.device.type != "cuda":
            return None
        first = self._served.first_device + index * self._config.tensor_parallel
        return ",".join(str(first + i) for i in range(self._config.tensor_parallel))

    @property
    def _sends_adapter(self) -> bool:
        wanted = self._config.publish.adapter_only
        return self._served.adapter is not None and wanted is not False

    def _adapter(self) -> tuple[Path, str] | None:
        if not self._sends_adapter:
            return None
        assert self._served.adapter is not None, "there is an adapter to send"
        return self._served.output_dir / "engines" / "adapters", self._served.adapter

    def _transport(self) -> Transport:
        config, served = self._config, self._served
        by = config.publish.by
        local = all(server.is_here for server in self._fleet.servers)
        if by == "auto":
            # Handles where memory is shared, the network where the disk is not, else a folder: it outlives a server.
            by = "shared" if served.colocated and served.device.type == "cuda" else "file"
            whole = config.publish.delta and not self._dialect.reads_deltas
            if (not local and config.publish.folder is None) or (by == "file" and whole):
                by = "broadcast"
        if by == "broadcast":
            return ByBroadcast(self._fleet, self._bridge, config.publish, served.device)
        if by == "shared":
            return ByHandle(self._fleet, self._bridge, config.publish, served.device)
        place = place_for(config.publish.folder, served.output_dir, served.num_bytes, local=local)
        beside = Path(served.model) if Path(served.model).is_dir() else None
        return ByFile(
            self._fleet, self._bridge, config.publish, WeightFolder(place, beside), delta=config.publish.delta
        )

    # --- what callers see ---------------------------------------------------------------------------------

    async def generate(self, tokens: Sequence[int], sampling: Sampling, *, prefix_key: str | None = None) -> Completion:
        """Sample one completion of `tokens`; see `Engine.generate`."""
        self._require_open()
        tokens = tuple(map(int, tokens))
        self.validate(tokens, sampling)
        request = Request(tokens, sampling, prefix_key)
        self._early.add(request)
        try:
            await self._ready()
        finally:
            self._early.discard(request)
        return await self._bridge.run(self._fleet.generate(request))

    async def update_weights(self, snapshot: Snapshot | int) -> None:
        """Sample with these weights from the next token on; see `Engine.update_weights`."""
        self._require_open()
        if isinstance(snapshot, int):
            assert self._served.snapshot is not None, "somebody knows the weights of a version that is named alone"
            snapshot = self._served.snapshot(snapshot)
        self._first = False  # whatever the servers have is replaced
        await self._ready()
        async with self._one_at_a_time():
            await self._publisher.publish(snapshot)

    async def verify(self) -> None:
        """Hold what the servers compute against the trainer, now. Raises EngineError where it is something else."""
        await self._ready()
        async with self._one_at_a_time():
            await self._publisher.verify()

    async def pause(self) -> None:
        await self._ready()
        await self._bridge.run(self._fleet.pause())

    async def resume(self) -> None:
        await self._ready()
        await self._bridge.run(self._fleet.resume())

    async def abort(self, prefix_keys: Collection[str] | None = None) -> None:
        keys = None if prefix_keys is None else set(prefix_keys)
        for request in self._early:
            request.aborted = request.aborted or keys is None or request.key in keys
        await self._bridge.run(self._fleet.abort(keys))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._starting.cancel()
        await self._bridge.run(self._fleet.close())
        self._end()

    def _abandon(self) -> None:
        """The program ends without `close`: no server outlives it."""
        if not self._closed:
            self._closed = True
            for server in self._fleet.servers:
                if server.process is not None:
                    server.process.end()
            if self._router is not None:
                self._router.end()
            self._publisher.close()

    def _end(self) -> None:
        atexit.unregister(self._abandon)
        self._publisher.close()
        self._bridge.end()

    def release(self) -> None:
        """Let the servers give up their memory, where `engine.sleep` says so: the trainer is about to need it."""
        if not self._config.sleep or self._asleep or self._closed or not self._starting.done():
            return
        work = self._fleet.each(lambda server: server.dialect.sleep(server.channel, CONTROL_S))
        self._bridge.wait(work, 2 * CONTROL_S, "putting the engines to sleep")
        self._asleep = True

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and completion together at most."""
        known = [server.max_length for server in self._fleet.servers if server.max_length is not None]
        known += [] if self._served.max_positions is None else [self._served.max_positions]
        return min(known, default=None)

    def validate(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Raises EngineError for a request that cannot be served."""
        validate(tokens, sampling, self._served.vocabulary, self.max_length, self._served.tokenizer)

    def health(self) -> dict[str, Any]:
        status = "closed" if self._closed else "paused" if self._fleet.paused else "ok"
        active = self._fleet.num_active
        return {
            "status": status,
            "version": self._publisher.version,
            "active": active,
            "waiting": len(self._fleet.requests) - active,
            "engines": {server.name: server.state for server in self._fleet.servers},
        }

    def stats(self) -> dict[str, float]:
        """What dying servers have cost since the engine was made (see `Losses`)."""
        return dict(asdict(self._fleet.losses))

    def metrics(self) -> dict[str, float]:
        """What is worth logging since the last call: publishes, and engines lost so far."""
        losses = self._fleet.losses
        found = self._publisher.metrics() | {"engine/alive": float(len(self._fleet.living))}
        if losses.num_deaths:
            told = asdict(losses)
            found |= {f"engine/{name}": float(value) for name, value in told.items()}
        return found

    # --- beginnings ---------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed; make a new one")

    def _one_at_a_time(self) -> asyncio.Lock:
        loop = asyncio.get_running_loop()
        if self._gate_loop is not loop:
            self._gate_loop, self._gate = loop, asyncio.Lock()
        return self._gate

    async def _ready(self) -> None:
        """Servers are up, awake, and have the weights that they are to begin with."""
        self._caller = asyncio.get_running_loop()
        if not self._starting.done():
            await asyncio.shield(asyncio.wrap_future(self._starting))
        self._starting.result()
        if not self._asleep and not self._first:
            return
        async with self._one_at_a_time():
            if self._asleep:
                await self._bridge.run(
                    self._fleet.each(lambda server: server.dialect.wake(server.channel, 2 * CONTROL_S))
                )
                self._asleep = False
            if self._first:
                self._first = False
                await self._begin()

    async def _start(self) -> None:
        """Bring the servers up, and say meanwhile that this is what is waited for."""
        telling = asyncio.create_task(self._tell_start())
        try:
            await self._fleet.start()
        finally:
            telling.cancel()

    async def _tell_start(self) -> None:
        if self._config.address is not None:
            return
        count, kind = len(self._fleet.servers), self._dialect.name
        which = f"{kind}-0.log" if count == 1 else f"{kind}-*.log"
        logger.info(
            "starting %d %s engine(s); log %s; at most %g s (engine.start_timeout_s)",
            count,
            kind,
            self._served.output_dir / "engines" / which,
            self._config.start_timeout_s,
        )
        while True:
            await asyncio.sleep(TELL_S)
            logger.info("still starting (%.0f s)", time.monotonic() - self._began)

    async def _begin(self) -> None:
        served = self._served
        logger.info(
            "%d %s engine(s) answer after %.1f s",
            len(self._fleet.living),
            self._dialect.name,
            time.monotonic() - self._began,
        )
        if served.snapshot is not None and not served.holds_current():
            await self._publisher.publish(served.snapshot(self._publisher.version))
        elif self._config.publish.verify != "never":
            await self._publisher.verify()

    async def _restore(self, server: Server) -> bool:
        if await self._publisher.restore(server):
            return True
        caller = self._caller
        if (
            self._served.stands_still
            and self._served.snapshot is not None
            and caller is not None
            and caller.is_running()
        ):
            caller.call_soon_threadsafe(self._rescue, caller)
        return False

    def _rescue(self, loop: asyncio.AbstractEventLoop) -> None:
        """Publish once more for a server that has come back: the weights are only where the trainer is."""

        async def publish() -> None:
            assert self._served.snapshot is not None, "the weights are at hand"
            async with self._one_at_a_time():
                if any(server.state == "stale" for server in self._fleet.servers):
                    await self._publisher.publish(self._served.snapshot(self._publisher.version))

        task = loop.create_task(publish())
        self._rescuing.add(task)
        task.add_done_callback(self._rescued)

    def _rescued(self, task: asyncio.Task[None]) -> None:
        self._rescuing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("an engine that came back did not get the current weights: %s", error)
