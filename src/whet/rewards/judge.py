"""The reward `judge`: another model's verdict, asked for over an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx2
from pydantic import Field

from whet.errors import ConfigError, RewardError
from whet.types import Episode, Message, Prompt

TEMPLATE = """\
Here is a question and an answer to it.

[Question]
{prompt}

[Answer]
{response}

How good is the answer? Judge whether it is correct first, then whether it is complete and clear. Explain in a few \
sentences, then end with a line `Score: N`, where N is from 0 (useless) to 10 (perfect)."""
SCORE = r"score\W{0,6}(-?\d+(?:\.\d+)?)"
"""What the rule `score` looks for, in any case of letters: `Score: 7`, `"score": 7.5`, `**Score:** 7`."""
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
EXCERPT = 200


class JudgeReward:
    """Asks `POST base_url/chat/completions` about each response and reads a number from what comes back.

    A judge that does not answer, or whose answer holds no number within the limits, costs the episode; nothing
    is ever made up in its place. Busy servers (429, 5xx), lost connections and requests out of time are tried
    again, after growing pauses, or after what `Retry-After` says.
    """

    def __init__(
        self,
        *,
        base_url: Annotated[str, Field(description="As in http://localhost:8000/v1.")],
        model: Annotated[str, Field(description="Name of the judge at the endpoint.")],
        api_key_env: Annotated[str | None, Field(description="Environment variable that holds the key.")] = None,
        template: Annotated[str, Field(description="What is asked; {prompt}, {response}, {label} are filled in.")]
        | None = None,
        system: Annotated[str | None, Field(description="System message before it.")] = None,
        parse: Annotated[str, Field(description="`score`, or a regular expression with the verdict as its group.")]
        | None = None,
        words: Annotated[dict[str, float] | None, Field(description="Verdict in words -> number.")] = None,
        lowest: float | None = None,
        highest: float | None = None,
        scale: Annotated[float | None, Field(description="Factor that makes a reward of the number.")] = None,
        temperature: Annotated[float, Field(ge=0)] = 0.0,
        max_tokens: Annotated[int, Field(ge=1)] = 512,
        request_timeout_s: Annotated[float, Field(gt=0, description="Most seconds for one request.")] = 30.0,
        retries: Annotated[int, Field(ge=0, description="Further requests after one that failed.")] = 4,
        max_concurrent: Annotated[int, Field(ge=1, description="Most requests at a time.")] = 8,
    ) -> None:
        self.max_concurrent = max_concurrent
        self._url = _endpoint(base_url)
        self._headers = _authorization(api_key_env)
        self._template, self._system = template or TEMPLATE, system
        if "{response}" not in self._template:
            raise ConfigError("reward judge: template has no {response}; put it where the judged answer goes")
        own = template is None and parse is None  # our template asks for a number from 0 to 10
        low, high = (0.0, 10.0) if own and lowest is None and highest is None else (lowest, highest)
        factor = scale if scale is not None else 0.1 if own else 1.0
        self._verdict = _Verdict(parse or "score", words or {}, low, high, factor)
        self._body = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self._limit_s, self._retries = request_timeout_s, retries
        self._client: httpx2.AsyncClient | None = None
        self._in_flight = 0

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt without the label that the template asks for."""
        if "{label}" in self._template and prompt.label is None:
            raise ValueError("the label is missing, and the judge's template asks for {label}")

    async def __call__(self, episode: Episode) -> float:
        """The judge's number. Raises RewardError when there is none to be had."""
        values = {"prompt": as_text(episode.prompt.content), "response": episode.response}
        question = filled(self._template, {**values, "label": str(episode.prompt.label)})
        messages = [{"role": "system", "content": self._system}] if self._system else []
        async with self._connected() as client:
            reply = await self._ask(
                client, {**self._body, "messages": [*messages, {"role": "user", "content": question}]}
            )
        return self._verdict.number(reply)

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

    async def _ask(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> str:
        """The text of the judge's answer, after as many attempts as there may be."""
        failure, pause = "", 0.0
        for attempt in range(self._retries + 1):
            await asyncio.sleep(pause)
            pause = _pause(attempt)
            try:
                async with asyncio.timeout(self._limit_s):
                    response = await client.post(self._url, json=body)
            except (httpx2.TransportError, TimeoutError) as error:
                failure = f"{type(error).__name__} {error}".strip()
                continue
            if response.status_code == 200:
                return _text_of(response)
            failure = f"HTTP {response.status_code}: {response.text.strip()[:EXCERPT]!r}"
            if response.status_code not in RETRIED:
                raise RewardError(f"the judge at {self._url} refused the request: {failure}")
            pause = _asked_pause(response) or pause
        raise RewardError(
            f"the judge at {self._url} gave no answer in {self._retries + 1} requests; the last: {failure}"
        )


class _Verdict:
    """Reads the judge's number from its words."""

    def __init__(
        self, rule: str, words: dict[str, float], lowest: float | None, highest: float | None, scale: float
    ) -> None:
        self._lowest = -math.inf if lowest is None else lowest
        self._highest = math.inf if highest is None else highest
        if self._lowest >= self._highest:
            raise ConfigError(f"reward judge: lowest is {lowest:g}, which is not below highest, {highest:g}")
        self._words = {word.strip().lower(): number for word, number in words.items()}
        self._scale = scale
        try:
            self._pattern = re.compile(SCORE if rule == "score" else rule, re.IGNORECASE)
        except re.error as error:
            raise ConfigError(f"reward judge: parse is {rule!r}, which is no regular expression: {error}") from error
        if self._pattern.groups != 1:
            raise ConfigError(
                f"reward judge: parse is {rule!r}, which has {self._pattern.groups} groups; put exactly one around the "
                r"verdict, as in `verdict:\s*(\w+)`, and write (?:...) for others"
            )

    def number(self, reply: str) -> float:
        """The last match counts: judges think aloud first."""
        found = self._pattern.findall(reply)
        if not found:
            raise RewardError(f"the judge's answer holds no verdict: ...{reply.strip()[-EXCERPT:]!r}")
        said = found[-1].strip().lower()
        if said in self._words:
            return self._scale * self._words[said]
        try:
            value = float(said)
        except ValueError:
            known = (
                f"a number or one of {', '.join(self._words)}" if self._words else "a number (reward.words is empty)"
            )
            raise RewardError(f"the judge's verdict is {said[:EXCERPT]!r}, expected {known}") from None
        if not self._lowest <= value <= self._highest:
            raise RewardError(f"the judge's verdict is {value:g}, outside of {self._lowest:g} to {self._highest:g}")
        return self._scale * value


def filled(template: str, values: dict[str, str]) -> str:
    """The template with its places filled. What is filled in is not looked at again: answers may hold braces."""
    return re.sub(r"\{(prompt|response|label)\}", lambda place: values[place[1]], template)


def as_text(content: str | list[Message]) -> str:
    """A prompt as the judge reads it: text as it is, messages with who says them."""
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return str(content[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in content)


def _endpoint(base_url: str) -> str:
    if not re.match(r"https?://[^/\s]+", base_url):
        raise ConfigError(f"reward judge: base_url is {base_url!r}, expected a URL as in http://localhost:8000/v1")
    return f"{base_url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    if not os.environ.get(variable):
        raise ConfigError(
            f"reward judge: api_key_env is {variable!r}, but that environment variable is not set; set it to the key, "
            "or leave api_key_env out for an endpoint without keys"
        )
    return {"Authorization": f"Bearer {os.environ[variable]}"}


def _text_of(response: httpx2.Response) -> str:
    try:
        choice = response.json()["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise RewardError(
            f"the judge's answer has not the form of a chat completion: {response.text.strip()[:EXCERPT]!r}"
        ) from error
    if reason == "length":  # half a number is another number
        raise RewardError(f"the judge's answer was cut off; raise reward.max_tokens: ...{str(content)[-EXCERPT:]!r}")
    if not isinstance(content, str):
        raise RewardError(f"the judge answered without text: {content!r:.200}")
    return content


def _pause(attempt: int) -> float:
    """Seconds before the next attempt: twice as long each time, and never the same for all who wait."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1.0)


def _asked_pause(response: httpx2.Response) -> float | None:
    """What the server asks for in `Retry-After`, where that is a number of seconds."""
    try:
        return min(LONGEST_PAUSE_S, max(0.0, float(response.headers["Retry-After"])))
    except (KeyError, ValueError):
        return None
