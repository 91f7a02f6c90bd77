"""Asking a server: JSON posted over HTTP, tried again where that can help, and a clear failure where it cannot."""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from whet.errors import ConfigError, RewardError

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
EXCERPT = 200


class Endpoint:
    """Posts JSON to one URL, over connections that are shared by the calls in flight.

    Busy servers (429, 5xx), lost connections and requests out of time are tried again, after growing pauses, or
    after what `Retry-After` says. `who` is what messages call the server.
    """

    def __init__(
        self, url: str, *, who: str, request_timeout_s: float, retries: int, headers: Mapping[str, str] | None = None
    ) -> None:
        self.url = url
        self._who, self._limit_s, self._retries = who, request_timeout_s, retries
        self._headers = dict(headers or {})
        self._client: httpx2.AsyncClient | None = None
        self._in_flight = 0

    async def post(self, body: Mapping[str, Any]) -> httpx2.Response:
        """The first answer with status 200. Raises RewardError after as many attempts as there may be."""
        failure, pause = "", 0.0
        async with self._connected() as client:
            for attempt in range(self._retries + 1):
                await asyncio.sleep(pause)
                pause = _pause(attempt)
                try:
                    async with asyncio.timeout(self._limit_s):
                        response = await client.post(self.url, json=body)
                except (httpx2.TransportError, TimeoutError) as error:
                    failure = f"{type(error).__name__} {error}".strip()
                    continue
                if response.status_code == 200:
                    return response
                failure = f"HTTP {response.status_code}: {response.text.strip()[:EXCERPT]!r}"
                if response.status_code not in RETRIED:
                    raise RewardError(f"{self._who} at {self.url} refused the request: {failure}")
                pause = _asked_pause(response) or pause
        raise RewardError(
            f"{self._who} at {self.url} gave no answer in {self._retries + 1} requests; the last: {failure}"
        )

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[httpx2.AsyncClient]:
        """One client for all calls in flight; its connections are closed with the last of them."""
        if self._client is None:
            self._client = httpx2.AsyncClient(timeout=self._limit_s, headers=self._headers)
        client = self._client
        self._in_flight += 1
        try:
            yield client
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._client = None
                await client.aclose()


def checked_url(url: str, where: str) -> str:
    """A URL as it was written. Raises ConfigError for what is none; `where` names the setting."""
    if not re.match(r"https?://[^/\s]+", url):
        raise ConfigError(f"{where} is {url!r}, expected a URL as in http://localhost:8000/v1")
    return url


def bearer(variable: str | None, where: str) -> dict[str, str]:
    """The header with the key that an environment variable holds, none for None.

    Raises ConfigError when the variable is not set; `where` names the setting.
    """
    if variable is None:
        return {}
    if not os.environ.get(variable):
        raise ConfigError(
            f"{where} is {variable!r}, but that environment variable is not set; set it to the key, or leave "
            "api_key_env out for an endpoint without keys"
        )
    return {"Authorization": f"Bearer {os.environ[variable]}"}


def _pause(attempt: int) -> float:
    """Seconds before the next attempt: twice as long each time, and never the same for all who wait."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1.0)


def _asked_pause(response: httpx2.Response) -> float | None:
    """What the server asks for in `Retry-After`, where that is a number of seconds."""
    try:
        return min(LONGEST_PAUSE_S, max(0.0, float(response.headers["Retry-After"])))
    except (KeyError, ValueError):
        return None
