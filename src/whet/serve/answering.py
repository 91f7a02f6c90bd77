"""Answers of the engine to one request, all prompts and choices of it at once: whole, or as they are sampled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from whet.engines.local.engine import LocalEngine
from whet.engines.local.request import Piece
from whet.errors import EngineError
from whet.serve.conversation import Conversations
from whet.serve.replies import Reply
from whet.serve.text import Text
from whet.types import Completion, Sampling


@dataclass(frozen=True)
class Answering:
    """One request on its way: every prompt is sampled by every one of `samplings`."""

    engine: LocalEngine
    conversations: Conversations
    reply: Reply
    samplings: Sequence[Sampling]
    with_tools: bool

    @property
    def asked(self) -> list[tuple[Sequence[int], Sampling]]:
        """Prompt and sampling of every choice, in the order of their indices."""
        return [(prompt, sampling) for prompt in self.reply.prompts for sampling in self.samplings]

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises EngineError; cancelling takes everything out of the engine."""
        tasks = [asyncio.ensure_future(self.engine.generate(*one)) for one in self.asked]
        try:
            completions = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        choices = [self._choice(i, completion) for i, completion in enumerate(completions)]
        num_sampled = sum(len(completion.tokens) for completion in completions)
        return {**self.reply.head(), "choices": choices, "usage": self.reply.usage(num_sampled)}

    async def events(self, *, usage: bool) -> AsyncGenerator[str]:
        """The answer as server-sent events. A failure on the way is told as an event with an `error`."""
        count = 0
        try:
            if self.reply.is_chat:
                for i in range(len(self.asked)):
                    yield self._event(
                        self.reply.choice(i, {"delta": {"role": "assistant", "content": ""}}, None, [], [])
                    )
            async with aclosing(self._pieces()) as pieces:
                async for choice, num_tokens in pieces:
                    count += num_tokens
                    yield self._event(choice)
            if usage:
                yield _event({**self.reply.head(piece=True), "choices": [], "usage": self.reply.usage(count)})
        except EngineError as error:
            yield _event({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
        yield "data: [DONE]\n\n"

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        prompt, sampling = self.asked[index]
        text = self._text(sampling).add(list(completion.tokens), last=True)
        reason: str = completion.finish_reason
        said: dict[str, Any] = {"text": text}
        if self.reply.is_chat:
            said = {"message": self.conversations.message(text, with_tools=self.with_tools)}
            reason = "tool_calls" if "tool_calls" in said["message"] and reason == "stop" else reason
        parts = (completion.tokens, completion.logprobs)
        return self.reply.choice(index, said, reason, *parts, prompt=prompt, versions=completion.versions)

    async def _pieces(self) -> AsyncGenerator[tuple[dict[str, Any], int]]:
        """Choices of one piece each, and how many tokens it has, of all completions as they come."""
        ready: asyncio.Queue[tuple[dict[str, Any], int] | BaseException | None] = asyncio.Queue()

        async def follow(index: int) -> None:
            try:
                async with aclosing(self._piecewise(index)) as own:
                    async for piece in own:
                        ready.put_nowait(piece)
                ready.put_nowait(None)
            except Exception as error:
                ready.put_nowait(error)

        tasks = [asyncio.ensure_future(follow(i)) for i in range(len(self.asked))]
        try:
            left = len(tasks)
            while left:
                got = await ready.get()
                if isinstance(got, BaseException):
                    raise got
                if got is None:
                    left -= 1
                else:
                    yield got
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _piecewise(self, index: int) -> AsyncGenerator[tuple[dict[str, Any], int]]:
        """The pieces of one completion. Where tools are shown its text comes at the end, as it may be a call."""
        prompt, sampling = self.asked[index]
        text, first, told, offset = self._text(sampling), True, "", 0
        async with aclosing(self.engine.stream(prompt, sampling)) as pieces:
            async for piece in pieces:
                new = text.add(piece.tokens, last=piece.finish_reason is not None)
                told += new
                said, reason = self._said(new, told, piece)
                options: dict[str, Any] = {"prompt": prompt if first else None, "offset": offset}
                yield self.reply.choice(index, said, reason, piece.tokens, piece.logprobs, **options), len(piece.tokens)
                first, offset = False, len(told)

    def _said(self, new: str, told: str, piece: Piece) -> tuple[dict[str, Any], str | None]:
        reason: str | None = piece.finish_reason
        if not self.reply.is_chat:
            return {"text": new}, reason
        if not self.with_tools:
            return {"delta": {"content": new}}, reason
        if reason is None:
            return {"delta": {}}, None
        delta = self.conversations.message(told, with_tools=True)
        return {"delta": delta}, "tool_calls" if "tool_calls" in delta and reason == "stop" else reason

    def _text(self, sampling: Sampling) -> Text:
        ends = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= self.engine.stop_token_ids
        options = {"ends": ends, "stop": sampling.stop, "keep_special": self.with_tools}
        return Text(self.reply.tokenizer, **options)

    def _event(self, choice: dict[str, Any]) -> str:
        return _event({**self.reply.head(piece=True), "choices": [choice]})


def _event(shown: dict[str, Any]) -> str:
    return f"data: {json.dumps(shown, ensure_ascii=False)}\n\n"
