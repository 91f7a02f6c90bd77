"""Several servers as one: who gets a request, what becomes of those of a server that dies, and how it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from whet.config.engine import EngineConfig
from whet.engines.servers.http import Unreachable
from whet.engines.servers.request import Request
from whet.engines.servers.router import Router
from whet.engines.servers.server import CONTROL_S, Server
from whet.errors import EngineError
from whet.types import Completion

logger = logging.getLogger(__name__)

HOMES = 65536
"""Groups whose server is remembered."""
ABORT_S = 5.0
"""Most seconds for servers to give back what they abort; after it what has come is all there is."""
PATIENCE_S = 8.0
"""Least limit for a server to say that it lives: a machine may be busy."""
MAX_MOVES = 5
"""Times that one request may begin at a server that fails it, before the request itself is at fault."""


@dataclass
class Losses:
    """What dying servers have cost, since the fleet was made."""

    num_deaths: int = 0
    num_restarts: int = 0
    num_moved: int = 0
    """Requests that went on at another server."""
    tokens_kept: int = 0
    """Tokens that they had, and kept."""
    down_s: float = 0.0
    """Seconds from a death until the server sampled again."""


class Fleet:
    """Servers, and the requests among them. Lives in one event loop.

    `restore` brings the current weights to a server that has come up, and returns whether it could. With a `router`
    completions go through it.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        config: EngineConfig,
        stop_token_ids: frozenset[int],
        restore: Callable[[Server], Awaitable[bool]],
        router: Router | None = None,
    ) -> None:
        self._router = router
        self.servers, self._config, self._stops, self._restore = list(servers), config, stop_token_ids, restore
        self.losses = Losses()
        self.paused = False
        self.held = False
        self.requests: set[Request] = set()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._homes: OrderedDict[str, int] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._looks: dict[int, asyncio.Task[Any]] = {}
        self._room = max(1, config.max_concurrent * 5 // 4)  # a little more than is decoded, so that none runs dry
        self.patience_s = max(PATIENCE_S, 3 * config.health_interval_s)
        """Most seconds for a living server to say that it lives."""

    async def start(self) -> None:
        """Bring all servers up together, and watch over them. Raises EngineError as soon as one cannot come up."""
        coming = [asyncio.ensure_future(server.bring_up()) for server in self.servers]
        done, rest = await asyncio.wait(coming, return_when=asyncio.FIRST_EXCEPTION)
        for one in rest:
            one.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for one in done:
            one.result()
        if self._router is not None:
            await self._router.start()
        for server in self.servers:
            await self._admit(server)
            self._spawn(self._watch(server))

    @property
    def living(self) -> list[Server]:
        """Servers that answer, whatever weights they have."""
        return [server for server in self.servers if server.state in ("ready", "stale")]

    @property
    def num_active(self) -> int:
        return sum(len(server.active) for server in self.servers)

    # --- requests -----------------------------------------------------------------------------------------

    async def generate(self, request: Request) -> Completion:
        """See a request through, at whichever servers it takes. Raises EngineError."""
        self.requests.add(request)
        try:
            async with asyncio.timeout(self._config.timeout_s) as limit:
                while True:
                    server = await self._choose(request)
                    if server is None:
                        return request.completion("abort")
                    try:
                        reason = await self._at(server, request)
                    except Unreachable as error:
                        await self._move(server, request, error)
                        if len(request.output) >= request.sampling.max_tokens:
                            return request.completion("length")
                    else:
                        return request.completion(reason)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise EngineError(self._late(request)) from error
        finally:
            self.requests.discard(request)

    async def _at(self, server: Server, request: Request) -> Any:
        """What one server makes of a request. Raises Unreachable where it is cut short because the server died."""
        request.where = server.name
        try:
            async with asyncio.timeout(None) as request.scope:
                return await server.sample(request, self._stops)
        except TimeoutError:
            if request.aborted:
                return "abort"
            raise Unreachable(request.cut or f"{server.name} was given up") from None
        finally:
            request.scope = None
            self._wake(1)

    async def _move(self, server: Server, request: Request, error: Unreachable) -> None:
        """Let a request go on elsewhere, once it is known whether its server lives."""
        request.num_moves += 1
        request.where = ""
        if request.num_moves > MAX_MOVES + len(self.servers):
            raise EngineError(f"a request failed {request.num_moves} times at different servers; the last: {error}")
        self.losses.num_moved += 1
        self.losses.tokens_kept += len(request.output)
        if server.state == "ready":
            if server.index not in self._looks:
                self._looks[server.index] = look = self._spawn(self._look(server))
                look.add_done_callback(lambda _: self._looks.pop(server.index))
            await asyncio.wait({self._looks[server.index]})

    async def _choose(self, request: Request) -> Server | None:
        """The server that a request goes to, once there is one with room; None if it is aborted before."""
        while not request.aborted:
            if not (self.paused or self.held) and (server := self._best(request.key)) is not None:
                return server
            if all(server.state == "gone" for server in self.servers):
                raise EngineError(f"no engine is left: {'; '.join(server.why for server in self.servers)}")
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake(1)  # this one's turn is another's
                raise
        return None

    def _best(self, key: str | None) -> Server | None:
        """The server that knows the prompt unless it has much more to do than another, else the one with least."""
        ready = [server for server in self.servers if server.state == "ready" and len(server.active) < self._room]
        if not ready:
            return None
        least = min(ready, key=lambda server: (len(server.active), server.index))
        if key is None:
            return least
        home = self._homes.get(key)
        chosen = next((server for server in ready if server.index == home), None)
        if chosen is None or len(chosen.active) - len(least.active) > max(4, self._room // 4):
            chosen = least
        self._homes[key] = chosen.index
        self._homes.move_to_end(key)
        if len(self._homes) > HOMES:
            self._homes.popitem(last=False)
        return chosen

    def _wake(self, most: int | None = None) -> None:
        """Let those that wait for a server look again, all or so many."""
        while self._waiters and (most is None or most > 0):
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                most = None if most is None else most - 1

    def _late(self, request: Request) -> str:
        told = f"{request.where} works on it" if request.where else "it waited for a server with room"
        states = ", ".join(f"{server.name}: {server.state}" for server in self.servers)
        return (
            f"a completion did not end within {self._config.timeout_s:g} s: {len(request.output)} of at most "
            f"{request.sampling.max_tokens} tokens were sampled, {told} ({states}). Raise engine.timeout_s, or lower "
            "max_tokens or the number of requests at a time"
        )

    async def abort(self, keys: Collection[str] | None) -> None:
        """End requests with what they have; when this returns, they have ended or their servers were given up on."""
        chosen = [one for one in self.requests if keys is None or one.key in keys]
        for request in chosen:
            request.aborted = True
        self._wake()
        limit = asyncio.get_running_loop().time() + ABORT_S
        while left := [one for one in chosen if one in self.requests]:
            if asyncio.get_running_loop().time() > limit:
                for request in left:
                    request.interrupt("aborted")
                break
            for server in self.living:
                ids = [one.id for one in left if self._router is not None or one.id in server.active]
                with contextlib.suppress(EngineError):  # a server that fails is seen by its watch
                    await server.dialect.abort(server.channel, ids, ABORT_S)
            # A request that had not reached its server when it was told is told again.
            await asyncio.sleep(0.05)

    async def some_living(self) -> None:
        """Wait until at least one server lives. Raises EngineError when none is left, or none comes back in time."""
        limit = asyncio.get_running_loop().time() + self._config.start_timeout_s
        while not self.living:
            if all(server.state == "gone" for server in self.servers):
                raise EngineError(f"no engine is left: {'; '.join(server.why for server in self.servers)}")
            if asyncio.get_running_loop().time() > limit:
                told = "; ".join(f"{server.name}: {server.why or server.state}" for server in self.servers)
                raise EngineError(f"no engine came back within {self._config.start_timeout_s:g} s: {told}")
            await asyncio.sleep(0.05)

    # --- standing still -----------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Sample nothing until `resume`."""
        self.paused = True
        await self.each(lambda server: server.dialect.pause(server.channel, CONTROL_S))

    async def resume(self) -> None:
        self.paused = False
        await self.each(lambda server: server.dialect.resume(server.channel, CONTROL_S))
        self._wake()

    async def hold(self) -> None:
        """Stand still for new weights."""
        self.held = True
        if not self.paused:
            await self.each(lambda server: server.dialect.pause(server.channel, CONTROL_S))

    async def go_on(self) -> None:
        self.held = False
        if not self.paused:
            await self.each(lambda server: server.dialect.resume(server.channel, CONTROL_S))
        self._wake()

    async def each(self, ask: Callable[[Server], Coroutine[Any, Any, Any]]) -> dict[int, Any]:
        """Ask every living server the same at the same time; what they answer, by their index.

        One that fails is put down. Raises EngineError when one refuses, or none is left.
        """
        servers = self.living
        results = await asyncio.gather(
            *(self._while_it_lives(one, ask(one)) for one in servers), return_exceptions=True
        )
        found: dict[int, Any] = {}
        refused: BaseException | None = None
        for server, result in zip(servers, results, strict=True):
            if isinstance(result, Unreachable) and not await self._lives(server):
                await self._down(server, result)
            elif isinstance(result, BaseException):
                refused = refused or result
            else:
                found[server.index] = result
        if refused is not None:
            raise refused
        if servers and not found and all(server.state == "gone" for server in self.servers):
            raise EngineError(f"no engine is left: {'; '.join(server.why for server in self.servers)}")
        return found

    async def _while_it_lives(self, server: Server, work: Coroutine[Any, Any, Any]) -> Any:
        """What a server answers. Raises Unreachable once it is known to be dead, whatever limit the question has."""
        asking, dying = asyncio.ensure_future(work), asyncio.ensure_future(server.fallen.wait())
        try:
            await asyncio.wait({asking, dying}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise Unreachable(server.why)
            return asking.result()
        finally:
            asking.cancel()
            dying.cancel()

    # --- life and death -----------------------------------------------------------------------------------

    async def _watch(self, server: Server) -> None:
        """Look at a server again and again, and bring it back when it has died."""
        while server.state != "gone":
            await asyncio.sleep(self._config.health_interval_s)
            if server.state in ("ready", "stale"):
                await self._look(server)
            elif server.state == "down":
                await self._bring_back(server)

    async def _look(self, server: Server) -> None:
        try:
            await server.alive(self.patience_s)
        except Unreachable as error:
            await self._down(server, error)

    async def _lives(self, server: Server) -> bool:
        """Whether a server that failed a question answers another: then the question is what failed."""
        try:
            await server.alive(self.patience_s)
        except Unreachable:
            return False
        return True

    async def _down(self, server: Server, error: Unreachable) -> None:
        if server.state in ("down", "gone"):
            return
        self.losses.num_deaths += 1
        again = server.external or server.restarts < self._config.max_restarts
        others = len(self.living) - 1
        logger.warning(
            "%s; %d requests go on elsewhere (%d other engines), and it %s",
            error,
            len(server.active),
            others,
            "is started again"
            if again and not server.external
            else "is waited for"
            if again
            else "is not started again",
        )
        why = str(error) if again else f"{error} (started again {server.restarts} times, engine.max_restarts)"
        await server.put_down("down" if again else "gone", why)
        if self._router is not None:
            for one in self.servers:  # who had which request, only the router knows
                one.interrupt(why)
            with contextlib.suppress(EngineError):
                await self._router.serve([one.channel.address for one in self.living])
        self._wake()

    async def _bring_back(self, server: Server) -> None:
        died = server.since
        try:
            if not server.external:
                server.restarts += 1
            await server.bring_up()
            await self._admit(server)
        except EngineError as error:
            if server.external:
                server.state, server.since = "down", died  # somebody else has to start it
                server.fallen.set()
                return
            server.state = "starting"
            self.losses.num_deaths -= 1  # it is the same death
            await self._down(server, Unreachable(str(error)))
            return
        self.losses.num_restarts += 1
        self.losses.down_s += time.monotonic() - died
        logger.info("%s is back after %.1f s", server.name, time.monotonic() - died)

    async def _admit(self, server: Server) -> None:
        """Give a server that has come up the current weights, and then requests."""
        restored = await self._restore(server)
        if self._router is not None:
            server.front = self._router.channel
            await self._router.serve([one.channel.address for one in (*self.living, server)])
        server.state = "ready" if restored else "stale"
        if self.paused or self.held:
            await server.dialect.pause(server.channel, CONTROL_S)
        self._wake()

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("watching over the engines failed: %s", error, exc_info=error)

    async def close(self) -> None:
        """End everything that was started."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for request in list(self.requests):
            request.aborted = True
            request.interrupt("closed")
        self._wake()
        await asyncio.gather(*(server.put_down("gone", "the engine is closed") for server in self.servers))
        for server in self.servers:
            if server.external:
                await server.channel.close()
        if self._router is not None:
            await self._router.close()
