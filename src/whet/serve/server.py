"""The server itself: a socket on loopback and its life in the engine's event loop."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from contextlib import contextmanager

import uvicorn
from transformers import PreTrainedTokenizerBase

from whet.engines.local.engine import LocalEngine
from whet.errors import ConfigError, EngineError
from whet.serve.app import Service, make_app

logger = logging.getLogger(__name__)

START_S, STOP_S = 10.0, 5.0
"""Most seconds to wait until requests are taken, and for requests in flight when the server ends."""


class Server:
    """Serves an engine over HTTP in the event loop that the engine runs in: beside a trainer, or alone.

    `name` is the model's name for clients. On another host than loopback an `api_key` is required. `port` 0 takes a
    free one; see `url`. Of more than `max_requests` at a time the rest is refused, not queued.
    `async with Server(engine, tokenizer) as server:` starts and stops it; the engine stays open.
    Raises ConfigError for an address that cannot be used.
    """

    def __init__(
        self,
        engine: LocalEngine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "whet",
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: str | None = None,
        max_requests: int = 1024,
    ):
        self.host, self.port = host, port
        check_address(host, api_key)
        hosts = ["localhost", "127.0.0.1", "[::1]", host] if _is_loopback(host) else ["*"]
        app = make_app(Service(engine, tokenizer, name, max_requests), api_key=api_key, hosts=hosts)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=int(STOP_S)
        )
        self._server = _Uvicorn(config)
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """What OpenAI's clients take as `base_url`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    async def start(self) -> None:
        """Take requests from here on."""
        listening = _listen(self.host, self.port)
        self.port = listening.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]), name="whet server")
        deadline = asyncio.get_running_loop().time() + START_S
        while not self._server.started:
            if self._task.done():
                self._task.result()
            if self._task.done() or asyncio.get_running_loop().time() > deadline:
                raise EngineError(f"the server did not begin to take requests within {START_S:g} s")
            await asyncio.sleep(0.01)
        if not _is_loopback(self.host):
            logger.warning("others can reach this server at %s; traffic is not encrypted", self.url)

    async def stop(self) -> None:
        """Take no more requests, and end when those in flight have, or after a few seconds."""
        if self._task is not None:
            self._server.should_exit = True
            await self._task
            self._task = None

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to whoever runs the event loop."""

    @contextmanager
    def capture_signals(self):
        yield


def check_address(host: str, api_key: str | None) -> None:
    """Raises ConfigError for a host that others can reach without a key."""
    if not _is_loopback(host) and not api_key:
        raise ConfigError(
            f"the host is {host!r}, where others can reach the server; give an API key (--api-key) that clients "
            "must send, or serve on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        if not 0 <= port < 2**16:  # which the C library would take modulo 65,536
            raise OverflowError("ports go from 0 to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        return listening
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; choose another with --port") from error
