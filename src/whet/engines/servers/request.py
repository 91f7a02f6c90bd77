"""One completion on its way through servers: what was asked, what has come, and by which weights."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from whet.types import Completion, FinishReason, Sampling, VersionSpan

STRIDE = 0x9E3779B97F4A7C15
"""Far from every other seed (Steele et al. 2014, the golden ratio's)."""


@dataclass(eq=False, slots=True)
class Request:
    """A prompt, how to sample from it, and what servers have answered so far.

    `scope` is the wait for an answer, which others may cut short: `cut` then says why.
    """

    tokens: tuple[int, ...]
    sampling: Sampling
    key: str | None
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    """Of what earlier servers sampled; the last server's follow when it has ended."""
    begun: int = 0
    """Tokens that there were when the present server began."""
    marks: list[tuple[int, int]] = field(default_factory=list)
    """(version, tokens that there were when it began to sample), for servers that do not tell."""
    id: str = ""
    aborted: bool = False
    cut: str | None = None
    scope: asyncio.Timeout | None = None
    num_moves: int = 0
    where: str = ""
    """The server that works on it."""

    def begin(self, version: int) -> None:
        """Another server takes over."""
        self.id, self.begun, self.cut = uuid.uuid4().hex, len(self.output), None
        self.marks = [(version, self.begun)]

    @property
    def remaining(self) -> Sampling:
        """How to sample what is still missing. What has come is not sampled again, so its noise must not come again:
        the seed of a continuation is another one."""
        if not self.output:
            return self.sampling
        seed = (self.sampling.seed + STRIDE * len(self.output)) % 2**63
        return replace(self.sampling, max_tokens=self.sampling.max_tokens - len(self.output), seed=seed)

    def mark(self, version: int) -> None:
        """New weights are in use from the next token on."""
        self.marks.append((version, len(self.output)))

    def leave(self, told: Sequence[VersionSpan] | None = None) -> None:
        """The present server has ended: `told` are its spans over the tokens that it sampled, where it tells."""
        if told is None:
            ends = [start for _, start in self.marks[1:]] + [len(self.output)]
            marked = (VersionSpan(v, start, end) for (v, start), end in zip(self.marks, ends, strict=True))
            self.spans += [span for span in marked if span.end > span.start]
        else:
            self.spans += [VersionSpan(s.version, s.start + self.begun, s.end + self.begun) for s in told]
        self.marks = []

    def interrupt(self, why: str) -> None:
        """End the wait for the present server."""
        if self.scope is not None and self.cut is None:
            self.cut = why
            self.scope.reschedule(asyncio.get_running_loop().time())

    def completion(self, reason: FinishReason) -> Completion:
        """What the caller gets."""
        return Completion(self.output, self.logprobs, reason, tuple(_joined(self.spans)))


def _joined(spans: Sequence[VersionSpan]) -> list[VersionSpan]:
    """Neighbouring spans of one version as one."""
    found: list[VersionSpan] = []
    for span in spans:
        if found and found[-1].version == span.version and found[-1].end == span.start:
            found[-1] = replace(found[-1], end=span.end)
        else:
            found.append(span)
    return found
