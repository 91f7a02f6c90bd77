"""One request on its way through the embedded engine: what it asks for and what it has so far."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from whet.errors import EngineError
from whet.types import Completion, FinishReason, Sampling, VersionSpan


class StopText:
    """Texts that end a completion, looked for at the end of its decoded tokens."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self.tokenizer = tokenizer
        self.texts = tuple(texts)
        # A character takes at most four tokens (its bytes). The rest is room for a token that the text
        # begins or ends in, and for tokens that decode to nothing.
        self.window = 4 * max(map(len, self.texts)) + 8

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether one of the texts stands in the last tokens, across their borders and the bytes of a character."""
        tail = self.tokenizer.decode(
            tokens[-self.window :], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return any(text in tail for text in self.texts)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a completion as they are sampled, and their logprobs; the last one says why it ended."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None = None


@dataclass(eq=False, slots=True)
class Request:
    """A prompt, how to sample from it, and the tokens it has so far; `row` is -1 while it waits."""

    tokens: tuple[int, ...]
    sampling: Sampling
    stop_token_ids: frozenset[int]
    stop_text: StopText | None
    answer: asyncio.Future[Completion]
    key: str | None = None
    row: int = -1
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)
    """(version, index of the first token sampled by it), in order."""
    progress: asyncio.Event | None = None
    """Set with every token, and at the end, for who watches."""

    def mark(self, version: int) -> None:
        """From the next token on, `version` samples."""
        self.marks.append((version, len(self.output)))

    def finish(self, reason: FinishReason) -> None:
        """Answer whoever waits for this request."""
        if not self.answer.done():
            self.answer.set_result(Completion(self.output, self.logprobs, reason, self._spans()))

    def _spans(self) -> tuple[VersionSpan, ...]:
        ends = [start for _, start in self.marks[1:]] + [len(self.output)]
        spans = (VersionSpan(version, start, end) for (version, start), end in zip(self.marks, ends, strict=False))
        return tuple(span for span in spans if span.end > span.start)


def validate(tokens: Sequence[int], sampling: Sampling, vocabulary: int, limit: int | None, tokenizer: Any) -> None:
    """Raises EngineError for a request that a model of so many tokens and positions cannot serve."""
    if not tokens:
        raise EngineError("the prompt has no tokens; an engine needs at least one to begin with")
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise EngineError(
            f"the prompt holds token {max(tokens) if min(tokens) >= 0 else min(tokens)}, but the model's "
            f"vocabulary has {vocabulary}; use the tokenizer that belongs to the model"
        )
    if sampling.max_tokens < 1:
        raise EngineError(f"max_tokens is {sampling.max_tokens}, expected at least 1")
    if limit is not None and len(tokens) + sampling.max_tokens > limit:
        raise EngineError(
            f"the prompt has {len(tokens)} tokens and max_tokens is {sampling.max_tokens}, together more than the "
            f"{limit} positions of the model (max_position_embeddings); shorten the prompt or lower max_tokens"
        )
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        raise EngineError(
            f"temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}: expected "
            "temperature at least 0, top_p above 0 and at most 1, top_k at least 0"
        )
    if sampling.stop and (tokenizer is None or not all(sampling.stop)):
        raise EngineError("stop strings must not be empty, and need an engine that was given a tokenizer")
