"""A `sglang-router` before SGLang servers: started beside them, and told which of them live."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Collection
from pathlib import Path

from whet.config.engine import EngineConfig
from whet.engines.servers.http import Channel, Unreachable
from whet.engines.servers.process import Process, free_port
from whet.errors import EngineError

ANSWER_S = 10.0
START_S = 60.0


class Router:
    """Completions go through `channel`; everything else goes to the servers themselves.

    A request is not tied to the server that the fleet has counted it to: when one dies, whatever was on its way is
    asked for again, from the tokens that had come.
    """

    def __init__(self, config: EngineConfig, logs: Path) -> None:
        self._config, self._log = config, logs / "sglang-router.log"
        self._process: Process | None = None
        self._known: dict[str, str] = {}
        self.channel: Channel | None = None

    async def start(self) -> None:
        """Start it without any server, and wait until it answers. Raises EngineError."""
        python, port = self._config.python or sys.executable, free_port()
        arguments = [
            *("-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)),
            *("--policy", "cache_aware", "--disable-retries", "--disable-circuit-breaker"),
            *("--request-timeout-secs", str(int(self._config.timeout_s) + 60), "--log-level", "warn"),
            *("--prometheus-port", str(free_port())),
        ]
        self._process = Process(python, arguments, {}, self._log, "sglang-router")
        self.channel = Channel(f"http://127.0.0.1:{port}", "sglang-router", self._config.max_concurrent * 8)
        limit = time.monotonic() + START_S
        while True:
            if (ended := self._process.ended) is not None:
                raise EngineError(
                    f"sglang-router {ended} before it answered; install it in the environment of engine.python, or set "
                    f"engine.router to own; {self._process.tail()}"
                )
            with contextlib.suppress(Unreachable):
                await self.channel.ask("/liveness", timeout_s=ANSWER_S)
                return
            if time.monotonic() > limit:
                raise EngineError(
                    f"sglang-router did not answer within {START_S:g} s of its start; {self._process.tail()}"
                )
            await asyncio.sleep(0.1)

    async def serve(self, addresses: Collection[str]) -> None:
        """Send requests to these servers, and to no others. Raises EngineError."""
        assert self.channel is not None, "the router has been started"
        for address in set(self._known) - set(addresses):
            worker = self._known.pop(address)
            with contextlib.suppress(EngineError):  # it has noticed by itself
                await self.channel.ask(f"/workers/{worker}", method="DELETE", timeout_s=ANSWER_S)
        for address in set(addresses) - set(self._known):
            body = {"url": address, "worker_type": "regular"}
            told = await self.channel.ask("/workers", body, timeout_s=ANSWER_S)
            self._known[address] = str((told or {}).get("worker_id", ""))
            await self._await_worker(address)

    async def _await_worker(self, address: str) -> None:
        assert self.channel is not None, "the router has been started"
        limit = time.monotonic() + START_S
        while time.monotonic() < limit:
            workers = (await self.channel.ask("/workers", timeout_s=ANSWER_S))["workers"]
            if any(one["url"].rstrip("/") == address and one.get("is_healthy", True) for one in workers):
                return
            await asyncio.sleep(0.1)
        raise EngineError(f"sglang-router did not take in {address} within {START_S:g} s; see {self._log}")

    async def close(self) -> None:
        """End it."""
        if self.channel is not None:
            await self.channel.close()
        self.end()

    def end(self) -> None:
        """End its process."""
        if self._process is not None:
            process, self._process = self._process, None
            process.end()
