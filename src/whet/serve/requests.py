"""What clients ask for, as OpenAI's API has it, and the sampling that follows from it."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from whet.serve.refusal import Refusal
from whet.types import Sampling

HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}
"""Parameters of OpenAI's API that change nothing about what is sampled."""
NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "min_p": 0,
    "min_tokens": 0,
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
}
"""Parameters that are accepted only at the value at which they change nothing."""

Texts = list[Annotated[str, Field(min_length=1)]]


class StreamOptions(BaseModel):
    """What a stream tells beside the tokens."""

    include_usage: bool = False


class Sampled(BaseModel):
    """What both kinds of request say about sampling. `top_k`, `stop_token_ids`, `ignore_eos` and `return_token_ids`
    are not OpenAI's; clients send them as `extra_body`."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    n: int = Field(default=1, ge=1, le=256)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    seed: int | None = None
    stop: Annotated[str, Field(min_length=1)] | Texts | None = None
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    def refuse_unknown(self) -> None:
        """Raise Refusal for a parameter that would be left out silently."""
        for name, value in (self.model_extra or {}).items():
            if name in HARMLESS or value is None or (name in NEUTRAL and value == NEUTRAL[name]):
                continue
            raise Refusal(400, f"{name} is {value!r}, which this server does not do; leave it out", param=name)

    def limit(self) -> int | None:
        """Most tokens of a completion, where the client says so."""
        return self.max_tokens

    def samplings(self, room: int) -> list[Sampling]:
        """How each of the `n` completions is sampled, with at most `room` tokens where the client gives no limit.

        The first has the client's own seed; without one every request draws another.
        """
        seed = secrets.randbits(62) if self.seed is None else self.seed
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return [
            Sampling(
                max_tokens=self.limit() or room,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=max(0, self.top_k),
                stop=stop,
                stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
                seed=seed + i * 0x9E3779B97F4A7C15,
            )
            for i in range(self.n)
        ]


class CompletionRequest(Sampled):
    """`POST /v1/completions`: texts or token ids to be continued."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0)

    def prompts(self) -> list[str | list[int]]:
        """One or several prompts, as a list. Raises Refusal for none."""
        if not self.prompt:
            raise Refusal(400, f"prompt is {self.prompt!r}; give text or token ids", param="prompt")
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return list(self.prompt)  # pyright: ignore[reportReturnType]

    def wants_logprobs(self) -> bool:
        if self.logprobs:
            _refuse_alternatives("logprobs", self.logprobs, "0")
        return self.logprobs is not None


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`: the next turn of a conversation."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the template is given. Raises Refusal for a choice that would have to be forced."""
        if self.tool_choice not in (None, "auto", "none"):
            text = f"tool_choice is {self.tool_choice!r}, but calls cannot be forced; use 'auto' or 'none'"
            raise Refusal(400, text, param="tool_choice")
        return None if self.tool_choice == "none" else self.tools or None

    def wants_logprobs(self) -> bool:
        if self.top_logprobs:
            _refuse_alternatives("top_logprobs", self.top_logprobs, "logprobs without it")
        return bool(self.logprobs)


def _refuse_alternatives(name: str, value: Any, instead: str) -> None:
    text = f"{name} is {value}, but only the logprobs of sampled tokens are known; use {instead}"
    raise Refusal(400, text, param=name)
