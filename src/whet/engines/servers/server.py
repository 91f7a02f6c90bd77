"""One server: its process if we started it, the requests it works on, and whether it lives."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Literal

from whet.config.engine import EngineConfig
from whet.engines.servers.dialect import Ask, Dialect, Start, spans
from whet.engines.servers.http import Channel, Unreachable
from whet.engines.servers.machine import Machine, Running
from whet.engines.servers.request import Request
from whet.errors import EngineError
from whet.types import FinishReason, VersionSpan

State = Literal["starting", "stale", "ready", "down", "gone"]
"""`stale` lives with weights that are not the current ones; `gone` is not started again."""
POLL_S = 0.25
HERE = ("127.0.0.1", "localhost")
CONTROL_S = 60.0
"""Most seconds for a server to answer a question that is no work."""


class Server:
    """A server of one kind, ours (`start`, on a `machine`) or somebody's (`address`)."""

    def __init__(
        self,
        index: int,
        dialect: Dialect,
        config: EngineConfig,
        start: Start,
        logs: Path,
        *,
        address: str | None = None,
        machine: Machine | None = None,
    ) -> None:
        self.index, self.dialect, self.config, self._start = index, dialect, config, start
        self._log, self._machine = logs / f"{dialect.name}-{index}.log", machine
        self.name = f"{dialect.name} engine {index}"
        self.external = address is not None
        self.process: Running | None = None
        self.state: State = "starting"
        self.version: int | None = None
        """Of the weights that it samples with."""
        self.adapter: str | None = None
        """Name of the adapter that it samples with."""
        self.known: dict[str, int] = {}
        """The versions that were published to it, as it names them."""
        self.active: dict[str, Request] = {}
        self.restarts = 0
        self.heard = 0.0
        """When it last said something of a request."""
        self.max_length: int | None = None
        self.world_size = config.tensor_parallel
        self.why = ""
        self.since = time.monotonic()
        self.front: Channel | None = None
        """A router that requests go through, to this server or to one of its like."""
        self.fallen = asyncio.Event()
        """Set while it is dead."""
        if address is not None:
            self._connect(address)

    def _connect(self, address: str) -> None:
        self.name = f"{self.dialect.name} engine {self.index} ({address})"
        self.channel = Channel(address, self.name, self.config.max_concurrent * 2)

    # --- its life -----------------------------------------------------------------------------------------

    async def bring_up(self) -> None:
        """Start the process, if it is ours, and wait until it answers. Raises EngineError."""
        self.state, self.version, self.since = "starting", None, time.monotonic()
        self.fallen.clear()
        if self._machine is not None:
            host, port = await self._machine.place()
            self._connect(f"http://{host}:{port}")
            arguments = self.dialect.command(self.config, self._start, host, port)
            environment = self.dialect.environment(self.config, self._start)
            self.process = await self._machine.start(self.config.python, arguments, environment, self._log, self.name)
        await self._await_ready()
        self.max_length = await self.dialect.max_length(self.channel, CONTROL_S)
        self.world_size = await self.dialect.world_size(self.channel, CONTROL_S)
        if self.external:
            await self.dialect.resume(self.channel, CONTROL_S)  # whoever used it before may have left it paused
        self.heard = time.monotonic()

    @property
    def is_here(self) -> bool:
        """Whether it sees the disk and the memory of this machine."""
        return self.channel.host in HERE if self._machine is None else self._machine.is_here

    async def _await_ready(self) -> None:
        limit = time.monotonic() + self.config.start_timeout_s
        while True:
            if self.process is not None and (ended := self.process.ended) is not None:
                raise EngineError(f"{self.name} {ended} before it answered; {self.process.tail()}")
            try:
                await self.dialect.ready(self.channel, 5.0)
                return
            except EngineError as error:
                if time.monotonic() > limit or self.external:
                    raise self._not_there(error) from error
            await asyncio.sleep(POLL_S)

    def _not_there(self, error: EngineError) -> EngineError:
        if self.process is None:
            return EngineError(f"{error}; start the server first, or correct engine.address")
        return EngineError(
            f"{self.name} did not answer within {self.config.start_timeout_s:g} s of its start; raise "
            f"engine.start_timeout_s if it is only slow; {self.process.tail()}"
        )

    async def alive(self, timeout_s: float) -> None:
        """Raises Unreachable where the process has ended or nothing answers within the limit."""
        if self.process is not None and (ended := self.process.ended) is not None:
            raise Unreachable(f"{self.name} {ended}; {self.process.tail()}")
        await self.dialect.ready(self.channel, timeout_s)
        if self.active and time.monotonic() - self.heard > timeout_s:
            # The front of a server may answer while what computes behind it stands still.
            await self.dialect.working(self.channel, timeout_s)
            self.heard = time.monotonic()

    def interrupt(self, why: str) -> None:
        """Its requests wait no longer."""
        for request in list(self.active.values()):
            request.interrupt(why)

    async def put_down(self, state: State, why: str) -> None:
        """End the process, if it is ours, and let go of the connections."""
        self.state, self.why, self.since = state, why, time.monotonic()
        self.fallen.set()
        self.interrupt(why)
        if self.process is not None:
            process, self.process = self.process, None
            await asyncio.to_thread(process.end)
            await self.channel.close()

    # --- requests -----------------------------------------------------------------------------------------

    async def sample(self, request: Request, stop_token_ids: frozenset[int]) -> FinishReason:
        """Let the server sample what is missing of a request. Raises Unreachable, with what has come in the request."""
        assert self.version is not None, "a server is asked for tokens once its weights are known"
        request.begin(self.version)
        self.active[request.id] = request
        told: tuple[VersionSpan, ...] | None = None
        stops = self._cut(request, stop_token_ids)
        tokens = [*request.tokens, *request.output]
        ask = Ask(request.id, tokens, request.remaining, sorted(stop_token_ids), self.version, self.adapter)
        path, body = self.dialect.request(ask)
        reason: FinishReason | None = None
        if len(self.active) == 1:
            self.heard = time.monotonic()
        events = (self.front or self.channel).stream(path, body)
        try:
            async for event in events:
                self.heard = time.monotonic()
                news = self.dialect.news(event, len(request.output) - request.begun)
                if stops and (cut := next((i for i, one in enumerate(news.tokens) if one in stops), None)) is not None:
                    request.output += news.tokens[: cut + 1]
                    request.logprobs += news.logprobs[: cut + 1]
                    return "stop"
                request.output += news.tokens
                request.logprobs += news.logprobs
                if news.finish_reason is not None:
                    reason = news.finish_reason
                    told = self._spans(news.versions, request)
        finally:
            self.active.pop(request.id, None)
            await events.aclose()
            request.leave(told)
        assert reason is not None, "a stream that ends without a reason raises"
        return reason

    def _cut(self, request: Request, stop_token_ids: frozenset[int]) -> frozenset[int]:
        """Stop tokens that the server would pass over, so that they are looked for here."""
        sampling = request.sampling
        if self.dialect.stops_with_ignore_eos or not sampling.ignore_eos:
            return frozenset()
        return frozenset(sampling.stop_token_ids)

    def _spans(self, told: tuple[tuple[str, int, int], ...] | None, request: Request) -> tuple[VersionSpan, ...] | None:
        if told is None or self.adapter is not None:  # the version of an adapter is in its name
            return None
        found = spans(told, self.known)
        if found is None:
            strange = next(name for name, _, _ in told if name not in self.known)
            raise EngineError(
                f"{self.name} sampled with weights of version {strange!r}, which this run has not published (it "
                f"published {', '.join(self.known)}); let no other run update this server"
            )
        if sum(span.end - span.start for span in found) != len(request.output) - request.begun:
            return None
        return found
