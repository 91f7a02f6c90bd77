"""Completions as OpenAI's API tells them, whole or in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from whet.types import VersionSpan


@dataclass
class Reply:
    """What all parts of one answer have in common."""

    model: str
    tokenizer: PreTrainedTokenizerBase
    is_chat: bool
    logprobs: bool
    token_ids: bool
    prompts: Sequence[Sequence[int]]
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"

    def head(self, *, piece: bool = False) -> dict[str, Any]:
        """Everything but choices and usage."""
        kind = "text_completion" if not self.is_chat else "chat.completion.chunk" if piece else "chat.completion"
        shown: dict[str, Any] = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        if self.token_ids and self.is_chat and not piece:
            shown["prompt_token_ids"] = list(self.prompts[0])
        return shown

    def choice(
        self,
        index: int,
        said: dict[str, Any],
        reason: str | None,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        *,
        prompt: Sequence[int] | None = None,
        versions: Sequence[VersionSpan] = (),
        offset: int = 0,
    ) -> dict[str, Any]:
        """One choice. `said` is its text, message or delta; `offset` counts the characters of earlier pieces."""
        choice: dict[str, Any] = {"index": index, **said, "finish_reason": reason, "logprobs": None}
        if self.logprobs:
            form = self._chat_logprobs if self.is_chat else self._text_logprobs
            choice["logprobs"] = form(tokens, logprobs, offset)
        if self.token_ids:
            choice["token_ids"] = list(tokens)
            if prompt is not None and not self.is_chat:
                choice["prompt_token_ids"] = list(prompt)
            if versions:
                spans = [{"version": span.version, "start": span.start, "end": span.end} for span in versions]
                choice["weight_versions"] = spans
        return choice

    def usage(self, num_sampled: int) -> dict[str, int]:
        given = sum(map(len, self.prompts))
        return {"prompt_tokens": given, "completion_tokens": num_sampled, "total_tokens": given + num_sampled}

    def _chat_logprobs(self, tokens: Sequence[int], logprobs: Sequence[float], offset: int) -> dict[str, Any]:
        texts = self._texts(tokens)
        return {
            "content": [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logprob in zip(texts, logprobs, strict=True)
            ]
        }

    def _text_logprobs(self, tokens: Sequence[int], logprobs: Sequence[float], offset: int) -> dict[str, Any]:
        texts, offsets = self._texts(tokens), []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        shown = {"tokens": texts, "token_logprobs": list(logprobs), "top_logprobs": None, "text_offset": offsets}
        return shown

    def _texts(self, tokens: Sequence[int]) -> list[str]:
        return [self.tokenizer.decode([token], skip_special_tokens=False) for token in tokens]
