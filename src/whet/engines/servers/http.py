"""A channel to one HTTP server: JSON questions and streamed answers, each with a limit and an error that says whose."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

from whet.errors import EngineError

IDLE_S = 2.0
"""Seconds after which an idle connection is given up: servers do so after five, and a question may cross with it."""
LOST = (httpx2.TransportError, httpx2.StreamError)


class Refused(EngineError):
    """The server answers, and says no: the question is at fault."""


class Unreachable(EngineError):
    """The server does not answer, or fails: another one may be asked the same."""


class Channel:
    """Questions to the server at `address`, which errors call `name`. Belongs to one event loop.

    As many connections are kept open as `num_connections` says; a question beyond that waits for one.
    """

    def __init__(self, address: str, name: str, num_connections: int = 256) -> None:
        self.address, self.name = address.rstrip("/"), name
        most = num_connections + 8
        limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most, keepalive_expiry=IDLE_S)
        # Neither proxies nor credentials of the environment concern a server of our own. The limits are the callers'.
        self._client = httpx2.AsyncClient(base_url=self.address, limits=limits, timeout=None, trust_env=False)

    @property
    def host(self) -> str:
        """The machine that the server runs on."""
        return httpx2.URL(self.address).host

    async def ask(
        self,
        path: str,
        body: Any = None,
        *,
        timeout_s: float,
        method: str | None = None,
        query: Mapping[str, str] | None = None,
        doing: str = "",
    ) -> Any:
        """The JSON that the server answers, None where it says nothing; POST where there is a body.

        Raises Unreachable when there is no answer within `timeout_s` or the server fails, Refused when it says no.
        """
        method = method or ("GET" if body is None else "POST")
        content = None if body is None else json.dumps(body).encode()
        told = f" to {doing}" if doing else ""
        try:
            answer = await self._request(method, path, content, query, timeout_s)
        except httpx2.TimeoutException as error:
            raise Unreachable(f"{self.name} did not answer {method} {path}{told} within {timeout_s:g} s") from error
        except LOST as error:
            raise Unreachable(f"{self.name} cannot be reached ({method} {path}{told}): {_why(error)}") from error
        self._check(answer.status_code, f"{method} {path}{told}", answer.content)
        try:
            return json.loads(answer.content) if answer.content else None
        except ValueError:
            return answer.text or None

    async def _request(
        self, method: str, path: str, content: bytes | None, query: Mapping[str, str] | None, timeout_s: float
    ) -> httpx2.Response:
        began = time.monotonic()
        for attempt in (1, 2):
            try:
                return await self._client.request(
                    method, path, content=content, params=query, headers=_JSON, timeout=timeout_s
                )
            except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError):
                # At once: the connection had been closed while it was idle, and the question was not heard.
                if attempt == 2 or time.monotonic() - began > 1.0:
                    raise
        raise AssertionError("the second attempt returns or raises")

    async def stream(self, path: str, body: Any) -> AsyncIterator[dict[str, Any]]:
        """The events of a streamed answer, as they come. The caller sets the limit. Raises as `ask` does."""
        done = False
        try:
            async with self._client.stream("POST", path, content=json.dumps(body).encode(), headers=_JSON) as answer:
                if answer.status_code != 200:
                    self._check(answer.status_code, f"POST {path}", await answer.aread())
                async for line in answer.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    if (data := line[5:].strip()) == "[DONE]":
                        done = True  # what follows is the end of the answer: read, it leaves the connection to others
                        continue
                    event = json.loads(data)
                    if (error := event.get("error")) is not None:
                        self._check(_code(error), f"POST {path}", json.dumps(error).encode())
                    yield event
        except LOST as error:
            raise Unreachable(f"{self.name} broke off an answer ({path}): {_why(error)}") from error
        if not done:
            raise Unreachable(f"{self.name} broke off an answer ({path}): the stream ended before it was done")

    async def close(self) -> None:
        """Let go of all connections."""
        await self._client.aclose()

    def _check(self, status: int, what: str, content: bytes) -> None:
        if status < 400:
            return
        kind = Refused if status < 500 and status not in (408, 429) else Unreachable
        raise kind(f"{self.name} answers {what} with {status}: {_told(content)}")


_JSON = {"Content-Type": "application/json"}


def _code(error: Any) -> int:
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and code >= 400 else 500


def _why(error: Exception) -> str:
    return f"{type(error).__name__} {error}".rstrip()


def _told(content: bytes, most: int = 500) -> str:
    """What a server says of an error, however it wraps it."""
    text = content.decode(errors="replace")
    try:
        told = json.loads(text)
        while isinstance(told, dict) and (inner := told.get("error", told.get("message", told.get("detail")))):
            told = inner
        text = told if isinstance(told, str) else json.dumps(told)
    except ValueError:
        pass
    return text[:most] + (" …" if len(text) > most else "") or "nothing more"
