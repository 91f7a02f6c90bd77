"""The reward `judge`: another model's verdict, asked for over an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated

import httpx2
from pydantic import Field

from whet.errors import ConfigError, RewardError
from whet.rewards.endpoint import EXCERPT, Endpoint, bearer, checked_url
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


class JudgeReward:
    """Asks `POST base_url/chat/completions` about each response and reads a number from what comes back.

    A judge that does not answer, or whose answer holds no number within the limits, costs the episode; nothing
    is ever made up in its place.
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
        base = checked_url(base_url, "reward judge: base_url").rstrip("/").removesuffix("/chat/completions")
        self._endpoint = Endpoint(
            f"{base}/chat/completions",
            who="the judge",
            request_timeout_s=request_timeout_s,
            retries=retries,
            headers=bearer(api_key_env, "reward judge: api_key_env"),
        )
        self._template, self._system = template or TEMPLATE, system
        if "{response}" not in self._template:
            raise ConfigError("reward judge: template has no {response}; put it where the judged answer goes")
        own = template is None and parse is None  # our template asks for a number from 0 to 10
        low, high = (0.0, 10.0) if own and lowest is None and highest is None else (lowest, highest)
        factor = scale if scale is not None else 0.1 if own else 1.0
        self._verdict = _Verdict(parse or "score", words or {}, low, high, factor)
        self._body = {"model": model, "temperature": temperature, "max_tokens": max_tokens}

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt without the label that the template asks for."""
        if "{label}" in self._template and prompt.label is None:
            raise ValueError("the label is missing, and the judge's template asks for {label}")

    async def __call__(self, episode: Episode) -> float:
        """The judge's number. Raises RewardError when there is none to be had."""
        values = {"prompt": as_text(episode.prompt.content), "response": episode.response}
        question = filled(self._template, {**values, "label": str(episode.prompt.label)})
        messages = [{"role": "system", "content": self._system}] if self._system else []
        body = {**self._body, "messages": [*messages, {"role": "user", "content": question}]}
        return self._verdict.number(_text_of(await self._endpoint.post(body)))


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
