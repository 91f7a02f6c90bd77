"""One request on its way through the embedded engine: what it asks for and what it has so far."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
