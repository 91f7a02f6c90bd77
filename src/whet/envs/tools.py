"""The environment `tools`: what the policy calls is run, and its output comes back by the model's chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from whet.config.plugin import resolve
from whet.envs.calls import FORMS, Call, Reader, spoken
from whet.envs.continuation import Continuation
from whet.envs.functions import Tool, ToolFailure, build_tools, output_text
from whet.errors import ConfigError, ModelError
from whet.rollout.episode import response_decoder
from whet.rollout.protocols import Observation, Turn
from whet.rollout.threads import Threads
from whet.types import Completion, Prompt

AUTO = "auto"
UNKNOWN = "unknown"
"""What a tool is called that is not there, where a template writes the name beside the output."""
PROBE = Call("look_up", {"text": "a b", "number": 2})


class Tools:
    """Makes the environment of each episode; reads tools and template once.

    functions: dotted paths, or objects with `use` and `schema`; `calculator` is built in. max_turns: completions of an
    episode at most; calls in the last are not run. timeout_s: seconds of one call at most. max_characters: what is
    kept of an output, max_output_tokens: tokens that the tools may add to an episode, which ends where one more turn
    would add more. max_concurrent: plain functions that run at a time. parser: how calls are written, one of FORMS,
    or a function of your own, `text -> calls`; told from the chat template when not given.
    Raises ConfigError for functions that are not there or not described.
    """

    def __init__(
        self,
        *,
        functions: list[str | dict[str, Any]],
        max_turns: Annotated[int, Field(ge=1)] = 8,
        timeout_s: Annotated[float, Field(gt=0)] = 10.0,
        max_characters: Annotated[int, Field(ge=1)] = 2000,
        max_output_tokens: Annotated[int, Field(ge=1)] = 2048,
        max_concurrent: Annotated[int, Field(ge=1)] = 16,
        parser: str = AUTO,
    ) -> None:
        self.by_name: Mapping[str, Tool] = build_tools(functions)
        self.max_turns, self.timeout_s, self.max_characters = max_turns, timeout_s, max_characters
        self.max_injected = max_output_tokens
        self.threads = Threads(max_concurrent)
        self._parser = parser
        self._own: Any = None if parser == AUTO else resolve(parser, FORMS, what="parser", where="env.parser")
        if parser != AUTO and not callable(self._own):
            raise ConfigError(f"env.parser is {parser!r}, a {type(self._own).__name__}; expected a function")
        self._read: Reader | None = self._own
        self._continuation: Continuation | None = None

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The schemas, for the prompts."""
        return [dict(tool.schema) for tool in self.by_name.values()]

    def prepare(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
        """Learn from the chat template how calls and outputs are written.

        Raises ModelError for a template that leaves them out, or writes calls in a form that is not known.
        """
        continuation = Continuation(tokenizer, variables)
        continuation.check()
        self._continuation, self._read = continuation, self._own or reader_of(continuation)

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt that shows a tool which is not there."""
        shown = [tool["function"]["name"] for tool in prompt.metadata.get("tools", ())]
        if missing := [name for name in shown if name not in self.by_name]:
            raise ValueError(f"its tools name {missing[0]!r}, but env.functions has {', '.join(self.by_name)}")

    def __call__(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> ToolEpisode:
        if self._continuation is None:
            self.prepare(tokenizer, {})
        assert self._continuation is not None and self._read is not None, "prepare sets both"
        return ToolEpisode(self, self._continuation, self._read)


class ToolEpisode:
    """One episode: turns with calls are answered with their outputs, and a turn without any is the last.

    A call that cannot be read, names no tool, fails or takes too long is answered with what was wrong.
    """

    def __init__(self, tools: Tools, continuation: Continuation, read: Reader) -> None:
        self._tools, self._continuation, self._read = tools, continuation, read
        self._decode = response_decoder(continuation.tokenizer)
        self._num_turns = self._num_calls = self._num_failed = self._num_injected = 0

    async def reset(self) -> Observation:
        return Observation()

    async def step(self, completion: Completion) -> Turn:
        self._num_turns += 1
        calls = list(self._read(spoken(self._decode(completion.tokens))))
        if not calls or self._num_turns >= self._tools.max_turns:
            return Turn(done=True)
        outputs = await asyncio.gather(*map(self._answer, calls))
        names = [call.name if call.name in self._tools.by_name else UNKNOWN for call in calls]
        tokens = self._continuation.tokens(outputs, completion.tokens[-1], names)
        self._num_injected += len(tokens)
        return Turn(False, Observation(tokens)) if self._num_injected <= self._tools.max_injected else Turn(done=True)

    def info(self) -> dict[str, float]:
        counts = {"num_turns": self._num_turns, "num_calls": self._num_calls}
        return {**counts, "num_failed_calls": self._num_failed}

    async def _answer(self, call: Call) -> str:
        tools = self._tools
        self._num_calls += 1
        try:
            if call.error is not None:
                raise ToolFailure(call.error)
            if call.name not in tools.by_name:
                raise ToolFailure(f"there is no tool {call.name!r}; there are {', '.join(tools.by_name)}")
            result = await tools.by_name[call.name].run(call, tools.threads, tools.timeout_s)
        except ToolFailure as failure:
            self._num_failed += 1
            result = f"Error: {failure}"
        return output_text(result, tools.max_characters)


def reader_of(continuation: Continuation) -> Reader:
    """The form that reads back a call which the chat template wrote. Raises ModelError where none does."""
    written = continuation.written(PROBE.name, PROBE.arguments)
    spelled = written.removesuffix(continuation.text([""])[0]).rstrip()
    for read in FORMS.values():
        # The token that ends the turn is no part of the call, unless `</tool_call>` is that token.
        if [PROBE] in (list(read(spoken(spelled))), list(read(spoken(written)))):
            return read
    raise ModelError(
        f"the chat template writes a call as {written[:200]!r}, which none of the known forms ({', '.join(FORMS)}) "
        f"reads; set env.parser to a function of your own, as in my.parsers:read, that makes a list of "
        f"whet.envs.calls.Call out of a text"
    )


def schemas(functions: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the policy is shown of these functions, for the `tools` of rows made by hand."""
    return [dict(tool.schema) for tool in build_tools(functions, "functions").values()]
