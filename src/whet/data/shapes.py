"""The shapes of rows to imitate and of prompts, and the one form that each is read in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from whet.data.formats import describe
from whet.data.messages import json_of, read_messages, read_sharegpt, read_tools, require_trainable, text_of
from whet.data.problems import Malformed
from whet.types import Message

Task = Literal["sft", "preference", "unpaired", "reward"]
"""What rows are prepared for: to imitate, to prefer one of two, to judge one, to score one above the other."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages; assistant messages from index `trained_from` on are trained."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    trained_from: int = 0


@dataclass(frozen=True, slots=True)
class TextPair:
    """A plain prompt and the response to it. `system`, `history` and `tools` need a chat template."""

    prompt: str
    response: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, trained from its first to its last token."""

    text: str


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt to sample from, text or messages, with what a reward may want to know. Label 0 is a label."""

    prompt: str | list[Message]
    label: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    system: str = ""


SFTItem = Conversation | TextPair | Text


@dataclass(frozen=True, slots=True)
class Fields:
    """A row under our names of its columns; errors speak of the file's names."""

    values: Mapping[str, Any]
    columns: Mapping[str, str]

    def name(self, ours: str) -> str:
        return self.columns.get(ours, ours)

    def get(self, ours: str) -> Any:
        """The value, or None where the column is missing or another of our names has taken it."""
        if ours not in self.columns and ours in self.columns.values():
            return None
        return self.values.get(self.name(ours))

    def require(self, ours: str) -> Any:
        if self.name(ours) not in self.values:
            text = f"field '{self.name(ours)}' is missing (the row has {', '.join(self.values) or 'no fields'}); "
            raise Malformed("missing", f"{text}fill it in or remove the row")
        return self.get(ours)

    def text(self, ours: str, *, empty: bool = True) -> str:
        return text_of(self.require(ours), self.name(ours), empty=empty)

    def optional_text(self, ours: str) -> str:
        value = self.get(ours)
        return "" if value is None else text_of(value, self.name(ours))


@dataclass(frozen=True, slots=True)
class Shape(Generic[Item]):
    """The columns a shape needs, those it may have, and how a row of it is read."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Fields], Item]

    def fits(self, available: Collection[str], used: Collection[str]) -> bool:
        """Whether all that it needs is `available`, and it has a use for all our names in `used`."""
        return set(available).issuperset(self.required) and {*self.required, *self.optional}.issuperset(used)


def _messages(fields: Fields) -> Conversation:
    return _conversation(fields, read_messages(fields.require("messages"), fields.name("messages")), "messages")


def _sharegpt(fields: Fields) -> Conversation:
    messages = read_sharegpt(fields.require("conversations"), fields.name("conversations"))
    return _conversation(fields, messages, "conversations")


def _conversation(fields: Fields, messages: list[Message], ours: str) -> Conversation:
    require_trainable(messages, fields.name(ours))
    return Conversation(with_system(fields, messages), read_tools(fields.get("tools"), fields.name("tools")))


def with_system(fields: Fields, messages: list[Message]) -> list[Message]:
    """The messages with what the column `system` says before them."""
    system = fields.optional_text("system")
    if not system:
        return messages
    if messages[0]["role"] == "system":
        name = fields.name("system")
        raise Malformed("two system messages", f"field '{name}' is given, and the messages begin with a system message")
    return [{"role": "system", "content": system}, *messages]


def answer_in(ours: str) -> Callable[[Fields], Conversation | TextPair]:
    """A reader of `prompt` with the response under the name `ours`. Both may be messages (TRL's form)."""

    def read(fields: Fields) -> Conversation | TextPair:
        prompt, response = fields.require("prompt"), fields.require(ours)
        tools = read_tools(fields.get("tools"), fields.name("tools"))
        if not isinstance(prompt, list):
            response = fields.text(ours, empty=False)
            return TextPair(fields.text("prompt"), response, fields.optional_text("system"), tools=tools)
        messages = with_system(fields, read_messages(prompt, fields.name("prompt")))
        if isinstance(response, list):
            answer = read_messages(response, fields.name(ours))
        else:
            answer = [{"role": "assistant", "content": fields.text(ours, empty=False)}]
        require_trainable(answer, fields.name(ours))
        return Conversation([*messages, *answer], tools, trained_from=len(messages))

    return read


def alpaca(fields: Fields, answer: str = "output") -> TextPair:
    """Alpaca's form, with the answer under the name `answer`."""
    instruction, extra = fields.text("instruction"), fields.optional_text("input")
    prompt = f"{instruction}\n{extra}" if extra else instruction
    history = fields.get("history") or []
    history = json_of(history, fields.name("history")) if isinstance(history, str) else history
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        text = f"field '{fields.name('history')}' is {describe(history)}; expected a list of [prompt, response]"
        raise Malformed("wrong type", text)
    turns = tuple(
        (text_of(asked, f"{fields.name('history')}[{i}][0]"), text_of(said, f"{fields.name('history')}[{i}][1]"))
        for i, (asked, said) in enumerate(history)
    )
    return TextPair(prompt, fields.text(answer, empty=False), fields.optional_text("system"), turns)


def _text(fields: Fields) -> Text:
    return Text(fields.text("text", empty=False))


def _prompt(fields: Fields) -> PromptRow:
    prompt, system = fields.require("prompt"), fields.optional_text("system")
    if isinstance(prompt, list):
        prompt, system = with_system(fields, read_messages(prompt, fields.name("prompt"))), ""
        if prompt[-1]["role"] == "assistant":
            text = (
                f"field '{fields.name('prompt')}' ends with an assistant message; expected a user or tool message last"
            )
            raise Malformed("nothing to answer", text)
    else:
        prompt = fields.text("prompt", empty=False)
    metadata = fields.get("metadata")
    metadata = json_of(metadata, fields.name("metadata")) if isinstance(metadata, str) and metadata else metadata
    if metadata not in (None, "") and not isinstance(metadata, dict):
        text = f"field '{fields.name('metadata')}' is {describe(metadata)}; expected an object"
        raise Malformed("wrong type", text)
    tools = read_tools(fields.get("tools"), fields.name("tools"))
    return PromptRow(prompt, fields.get("label"), metadata or {}, tools, system)


SFT_SHAPES: tuple[Shape[SFTItem], ...] = (
    Shape(("messages",), ("tools", "system"), _messages),
    Shape(("conversations",), ("tools", "system"), _sharegpt),
    Shape(("prompt", "response"), ("tools", "system"), answer_in("response")),
    Shape(("prompt", "completion"), ("tools", "system"), answer_in("completion")),
    Shape(("instruction", "output"), ("input", "system", "history"), alpaca),
    Shape(("text",), (), _text),
)
PROMPT_SHAPES: tuple[Shape[PromptRow], ...] = (Shape(("prompt",), ("label", "metadata", "tools", "system"), _prompt),)
