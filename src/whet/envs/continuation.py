"""What a chat template writes after an assistant's turn: the new tokens only, history staying as it was sampled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from whet.data.chat import ChatTemplate
from whet.data.problems import Malformed
from whet.envs.insert import Inserter
from whet.errors import ModelError
from whet.types import Message

logger = logging.getLogger(__name__)

MARK = "whetmark"
THOUGHT = "whetthought"
OUTPUT = "whetoutput"
NAME = "whetname"
USER: Message = {"role": "user", "content": "A"}
REMEDY = "set model.chat_template to one that writes tool calls and tool messages"


@dataclass(frozen=True)
class Continuation:
    """Tokens of tool messages after a turn of the assistant, up to where it goes on.

    A made-up history is rendered with and without them. Only what comes after the made-up turn is used, so the real
    history is neither rendered nor tokenised again: where a template would rewrite it, it stays as it was sampled.
    """

    tokenizer: PreTrainedTokenizerBase
    variables: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ModelError for a template from whose renderings the continuation cannot be told."""
        if OUTPUT not in self.text([OUTPUT])[1]:
            raise ModelError(f"the chat template leaves out what a tool answers; {REMEDY}")
        if self._rewrites:
            logger.info(
                "the chat template takes the thoughts out of turns before a tool's answer; here they stay, as every "
                "token that was sampled does"
            )

    def tokens(self, outputs: Sequence[str], last: int, names: Sequence[str] = ()) -> list[int]:
        """The tokens after a turn that called `len(outputs)` tools and ended with the token `last`.

        `names` are those of the tools: some templates write them beside the output.
        Where the turn ended without its closing token (by a stop text), that comes first. Special tokens that a
        tool's output spells are broken up: only the template may write them.
        """
        ended, after = self.text([self._insert.harmless(output) for output in outputs], names)
        closing = self.tokenizer.convert_ids_to_tokens(last)
        if closing != ended and closing in self._insert.specials and after.lstrip().startswith(closing):
            # Where a turn has no end of its own (GLM), the policy ends it by giving the floor to the tool.
            after = after.lstrip().removeprefix(closing)
        elif closing != ended and closing not in self._insert.marked:
            after = ended + after
        return self._insert.tokens(after, behind=ended)

    def text(self, outputs: Sequence[str], names: Sequence[str] = ()) -> tuple[str, str]:
        """(the special token that ends the assistant's turn, what follows it)."""
        names = names or [NAME] * len(outputs)
        before, after = self.called(names), self.called(names, _answers(names, outputs))
        marks = before.count(MARK)
        before, after = before.split(MARK, marks)[-1], after.split(MARK, marks)[-1]
        shared = _shared(before, after)
        ends = [
            (shared.rfind(special) + len(special), special) for special in self._insert.specials if special in shared
        ]
        if not ends:
            raise ModelError(
                f"the chat template writes a turn with a call as ...{before[:60]!r}, and with a tool's answer after it "
                f"as ...{after[:60]!r}, so it cannot be told where the turn ends; {REMEDY}"
            )
        end, special = max(ends)
        return special, after[end:]

    def called(self, names: Sequence[str], following: Sequence[Message] = (), thought: str = "") -> str:
        """A made-up history in which these are called, with MARK as the argument, as the template renders it."""
        calls = [_call(position, name, {"x": MARK}) for position, name in enumerate(names)]
        turn = {"role": "assistant", "content": thought, "tool_calls": calls}
        text = self._render([USER, turn, *following], generation=bool(following))
        if MARK not in text:
            raise ModelError(f"the chat template leaves out the calls of tools; {REMEDY}")
        return text

    def written(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call as the template has the assistant write it, the token that ends the turn included."""
        turn = {"role": "assistant", "content": "", "tool_calls": [_call(0, name, arguments)]}
        said = self._render([USER, turn])
        return said[len(_shared(said, self._render([USER], generation=True))) :].rstrip()

    def _render(self, messages: list[Message], generation: bool = False) -> str:
        try:
            return self._template.render(messages, generation=generation)
        except Malformed as error:
            raise ModelError(f"{error}; environment 'tools' needs calls and tool messages") from error

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.variables)

    @cached_property
    def _insert(self) -> Inserter:
        return Inserter(self.tokenizer)

    @cached_property
    def _rewrites(self) -> bool:
        """Whether thoughts vanish from a turn once a tool has answered it."""
        thought = f"<think>\n{THOUGHT}\n</think>\n\n"
        texts = (self.called([NAME], messages, thought) for messages in ((), _answers([NAME], [OUTPUT])))
        return [THOUGHT in text for text in texts] == [True, False]


def _call(position: int, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    # Mistral's templates want nine letters or digits.
    function = {"name": name, "arguments": dict(arguments)}
    return {"type": "function", "id": f"call{position:05d}", "function": function}


def _answers(names: Sequence[str], outputs: Sequence[str]) -> list[Message]:
    return [
        {"role": "tool", "name": name, "tool_call_id": f"call{position:05d}", "content": output}
        for position, (name, output) in enumerate(zip(names, outputs, strict=True))
    ]


def _shared(first: str, second: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return min(first, second, key=len) if length is None else first[:length]
