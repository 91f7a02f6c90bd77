"""The shapes a row can have, recognised by its columns, and the one form that each task reads."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from whet.data.formats import describe
from whet.data.messages import json_of, read_messages, read_sharegpt, read_tools, require_trainable, text_of
from whet.data.problems import Malformed, Problems
from whet.data.rows import Row, Source, read_rows
from whet.errors import DataError
from whet.types import Message

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


@dataclass(frozen=True, slots=True)
class Placed(Generic[Item]):
    """An item with its row: `index` over all sources, and where it stands."""

    index: int
    row: Row
    item: Item


def read_items(
    sources: Sequence[Source], columns: Mapping[str, str], shapes: Sequence[Shape[Item]], problems: Problems
) -> Iterator[Placed[Item]]:
    """Every row of every source in the form of the task. Rows that cannot be used are added to `problems`.

    The first row of each source decides its shape. Raises DataError when no shape fits.
    """
    index = 0
    for source in sources:
        shape: Shape[Item] | None = None
        for row in read_rows(source, problems):
            shape = shape or recognise(row.values, columns, shapes, source.path)
            try:
                item = shape.read(Fields(row.values, columns))
            except Malformed as fault:
                problems.add(fault.kind, f"{row.place}: {fault}")
            else:
                yield Placed(index, row, item)
            index += 1


def recognise(
    found: Collection[str], columns: Mapping[str, str], shapes: Sequence[Shape[Item]], file: str
) -> Shape[Item]:
    """The first shape whose columns are among those `found` in the file, under the names `columns` gives them.

    Raises DataError for a name of ours that no task knows, for a mapped column that the file does not
    have, and when no shape fits; the error lists the columns found.
    """
    for ours in columns:
        if ours not in NAMES:
            near = difflib.get_close_matches(ours, NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(NAMES)}"
            raise DataError(f"data.columns maps {ours!r}, which is no column of ours; {hint}")
    used = {ours for ours in columns if any(ours in (*shape.required, *shape.optional) for shape in shapes)}
    for ours in sorted(used):
        if columns[ours] not in found:
            near = difflib.get_close_matches(columns[ours], found, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(found) or "none"
            raise DataError(f"data.columns maps {ours} to {columns[ours]!r}, but {file} has the columns {listed}{hint}")
    taken = set(columns.values())
    available = used | {name for name in found if name not in taken and name not in columns}
    for shape in shapes:
        if available.issuperset(shape.required) and used <= {*shape.required, *shape.optional}:
            return shape
    raise DataError(_no_shape(found, used, shapes, file))


_SYNONYMS = {
    "prompt": ("prompt", "question", "query", "instruction", "input", "problem", "source"),
    "response": ("response", "completion", "answer", "output", "solution", "target", "reply"),
    "messages": ("messages", "conversation", "dialogue", "dialog", "chat", "turns"),
    "text": ("text", "content", "body", "document"),
}


def _no_shape(found: Collection[str], used: set[str], shapes: Sequence[Shape], file: str) -> str:
    """No shape fits: what the file has, what would fit, and a mapping to try."""
    wanted = " · ".join(" + ".join(shape.required) for shape in shapes)
    mapped = f" (of which data.columns maps {', '.join(sorted(used))})" if used else ""
    guess = _guess(found, shapes)
    example = ", ".join(f"{ours}: {theirs}" for ours, theirs in guess.items())
    return (
        f"{file} has the columns {', '.join(found) or 'none'}{mapped}; expected {wanted}; "
        f"name yours in data.columns, as in {{{example}}}"
    )


def _guess(found: Collection[str], shapes: Sequence[Shape]) -> dict[str, str]:
    """Our names -> the file's, for the shape that its column names suggest; placeholders when none does."""
    likely = {
        ours: next((name for synonym in synonyms for name in found if name.lower() == synonym), None)
        for ours, synonyms in _SYNONYMS.items()
    }
    for shape in shapes:
        if all(likely.get(ours) for ours in shape.required):
            return {ours: str(likely[ours]) for ours in shape.required}
    pair = next((shape for shape in shapes if "prompt" in shape.required), shapes[0])
    return {ours: likely.get(ours) or f"your_{ours}_column" for ours in pair.required}


def _messages(fields: Fields) -> Conversation:
    return _conversation(fields, read_messages(fields.require("messages"), fields.name("messages")), "messages")


def _sharegpt(fields: Fields) -> Conversation:
    messages = read_sharegpt(fields.require("conversations"), fields.name("conversations"))
    return _conversation(fields, messages, "conversations")


def _conversation(fields: Fields, messages: list[Message], ours: str) -> Conversation:
    require_trainable(messages, fields.name(ours))
    return Conversation(_with_system(fields, messages), read_tools(fields.get("tools"), fields.name("tools")))


def _with_system(fields: Fields, messages: list[Message]) -> list[Message]:
    system = fields.optional_text("system")
    if not system:
        return messages
    if messages[0]["role"] == "system":
        name = fields.name("system")
        raise Malformed("two system messages", f"field '{name}' is given, and the messages begin with a system message")
    return [{"role": "system", "content": system}, *messages]


def _pair(ours: str) -> Callable[[Fields], Conversation | TextPair]:
    """A reader of `prompt` with the response under the name `ours`. Both may be messages (TRL's form)."""

    def read(fields: Fields) -> Conversation | TextPair:
        prompt, response = fields.require("prompt"), fields.require(ours)
        tools = read_tools(fields.get("tools"), fields.name("tools"))
        if not isinstance(prompt, list):
            response = fields.text(ours, empty=False)
            return TextPair(fields.text("prompt"), response, fields.optional_text("system"), tools=tools)
        messages = _with_system(fields, read_messages(prompt, fields.name("prompt")))
        if isinstance(response, list):
            answer = read_messages(response, fields.name(ours))
        else:
            answer = [{"role": "assistant", "content": fields.text(ours, empty=False)}]
        require_trainable(answer, fields.name(ours))
        return Conversation([*messages, *answer], tools, trained_from=len(messages))

    return read


def _alpaca(fields: Fields) -> TextPair:
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
    return TextPair(prompt, fields.text("output", empty=False), fields.optional_text("system"), turns)


def _text(fields: Fields) -> Text:
    return Text(fields.text("text", empty=False))


def _prompt(fields: Fields) -> PromptRow:
    prompt, system = fields.require("prompt"), fields.optional_text("system")
    if isinstance(prompt, list):
        prompt, system = _with_system(fields, read_messages(prompt, fields.name("prompt"))), ""
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
    Shape(("prompt", "response"), ("tools", "system"), _pair("response")),
    Shape(("prompt", "completion"), ("tools", "system"), _pair("completion")),
    Shape(("instruction", "output"), ("input", "system", "history"), _alpaca),
    Shape(("text",), (), _text),
)
PROMPT_SHAPES: tuple[Shape[PromptRow], ...] = (Shape(("prompt",), ("label", "metadata", "tools", "system"), _prompt),)

NAMES = tuple(
    dict.fromkeys(name for shape in (*SFT_SHAPES, *PROMPT_SHAPES) for name in (*shape.required, *shape.optional))
)
"""Every name that `data.columns` may map."""
