"""The shapes of rows that hold a judgement: a chosen and a rejected completion, or one with a label."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from whet.data.formats import describe
from whet.data.messages import read_tools, read_turns, require_trainable
from whet.data.problems import Malformed
from whet.data.shapes import Conversation, Fields, SFTItem, Shape, Text, alpaca, answer_in, with_system
from whet.types import Message

SIDES = ("chosen", "rejected")

LARGEST_MARGIN = 1e30
"""Beyond, float32 arithmetic on margins overflows."""

_LABELS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of a prompt. As `Text`, both begin with the prompt. `margin`: how much better the chosen is."""

    chosen: SFTItem
    rejected: SFTItem
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """A completion of a prompt, and whether it is desirable."""

    item: SFTItem
    label: bool


def _prompted(fields: Fields) -> Pair:
    """`prompt`, `chosen` and `rejected`, each text or messages; both sides may repeat the prompt."""
    prompt = fields.require("prompt")
    sides = [fields.require(name) for name in SIDES]
    if not any(isinstance(value, list | dict) for value in (prompt, *sides)):
        return _pair(fields, answer_in("chosen")(fields), answer_in("rejected")(fields))
    if isinstance(prompt, list | dict):
        messages = read_turns(prompt, fields.name("prompt"))
    else:
        messages = [{"role": "user", "content": fields.text("prompt", empty=False)}]
    return _following(fields, messages, "prompt")


def _in_context(column: str) -> Callable[[Fields], Pair]:
    """A reader of the messages under the name `column`, and `chosen` and `rejected` that follow them."""

    def read(fields: Fields) -> Pair:
        return _following(fields, read_turns(fields.require(column), fields.name(column)), column)

    return read


def _ranking(fields: Fields) -> Pair:
    return _pair(fields, alpaca(fields, "chosen"), alpaca(fields, "rejected"))


def _alone(fields: Fields) -> Pair:
    """`chosen` and `rejected` that both begin with the prompt: texts, or messages."""
    sides = [fields.require(name) for name in SIDES]
    if not any(isinstance(side, list | dict) for side in sides):
        texts = [fields.text(name, empty=False) for name in SIDES]
        for name in ("system", "tools"):
            if fields.get(name):
                text = f"field '{fields.name(name)}' is given, but chosen and rejected are plain text"
                raise Malformed("needs messages", f"{text}; give them as messages, or leave it out")
        return _pair(fields, Text(texts[0]), Text(texts[1]))
    for name, side in zip(SIDES, sides, strict=True):
        if not isinstance(side, list | dict):
            text = f"field '{fields.name(name)}' is {describe(side)}, but the other of the two holds messages"
            raise Malformed("wrong type", f"{text}; give both in the same form")
    return _whole(fields, *(_side(fields, name) for name in SIDES))


def _following(fields: Fields, prompt: list[Message], column: str) -> Pair:
    """Both sides answer `prompt`, which stands under the name `column`; they may repeat it."""
    chosen, rejected = (_side(fields, name) for name in SIDES)
    if not (_begins_with_prompt(chosen) or _begins_with_prompt(rejected)):
        return _answered(fields, prompt, chosen, rejected)
    pair = _whole(fields, chosen, rejected)
    assert isinstance(pair.chosen, Conversation), "messages make conversations"
    if not _asks(pair.chosen.messages[: pair.chosen.trained_from], prompt[-1]):
        text = f"field '{fields.name(column)}' ends with {prompt[-1]['content'][:60]!r}"
        text += ", which is not among the messages that chosen and rejected begin with"
        raise Malformed("different prompts", f"{text}; correct it, or remove the field")
    return pair


def _side(fields: Fields, name: str) -> list[Message]:
    value = fields.require(name)
    if isinstance(value, list | dict):
        return read_turns(value, fields.name(name))
    return [{"role": "assistant", "content": fields.text(name, empty=False)}]


def _begins_with_prompt(side: list[Message]) -> bool:
    return side[0]["role"] not in ("assistant", "tool")


def _whole(fields: Fields, chosen: list[Message], rejected: list[Message]) -> Pair:
    """A pair of whole conversations: what they have in common at the start is the prompt."""
    for name, side in zip(SIDES, (chosen, rejected), strict=True):
        if not _begins_with_prompt(side):
            text = f"field '{fields.name(name)}' begins with a message of the {side[0]['role']}, not with the prompt"
            remedy = "put the prompt's messages first, or name their column in data.columns {prompt: …}"
            raise Malformed("without a prompt", f"{text}; {remedy}")
    # At least one message is the answer, also where both conversations are the same.
    most = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    return _answered(fields, chosen[:shared], chosen[shared:], rejected[shared:])


def _asks(messages: list[Message], question: Message) -> bool:
    """Whether the question is among the messages; blanks at its ends do not count."""
    wanted = (question["role"], question["content"].strip())
    return any((message["role"], message["content"].strip()) == wanted for message in messages)


def _answered(fields: Fields, prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Pair:
    tools = read_tools(fields.get("tools"), fields.name("tools"))
    prompt = with_system(fields, prompt) if prompt else prompt
    sides = []
    for name, answer in zip(SIDES, (chosen, rejected), strict=True):
        require_trainable(answer, fields.name(name))
        sides.append(Conversation([*prompt, *answer], tools, trained_from=len(prompt)))
    return _pair(fields, *sides)


def _pair(fields: Fields, chosen: SFTItem, rejected: SFTItem) -> Pair:
    return Pair(chosen, rejected, _margin(fields))


def _margin(fields: Fields) -> float | None:
    value, name = fields.get("margin"), fields.name("margin")
    if value in (None, ""):
        return None
    try:
        # CSV has numbers as text; true is no number, though Python takes it for one.
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not abs(margin) <= LARGEST_MARGIN:
        wanted = "a number" if math.isnan(margin) else f"a number from {-LARGEST_MARGIN:.0e} to {LARGEST_MARGIN:.0e}"
        raise Malformed("wrong type", f"field '{name}' is {describe(value)}; expected {wanted}; correct it")
    return margin


def _judged(read: Callable[[Fields], SFTItem], label: str = "label") -> Callable[[Fields], Judged]:
    return lambda fields: Judged(read(fields), _label(fields, label))


def _label(fields: Fields, ours: str) -> bool:
    """True or false, as such, as 1 or 0, or as text. Zero is a label; nothing is not."""
    value, name = fields.require(ours), fields.name(ours)
    if value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _LABELS:
        return _LABELS[value.strip().lower()]
    text = f"field '{name}' is {describe(value)}; expected true (desirable) or false"
    raise Malformed("null" if value is None else "wrong type", f"{text}; fill it in or remove the row")


def _conversation(column: str) -> Callable[[Fields], Conversation]:
    """A reader of a conversation under the name `column`, of which the last message is judged."""

    def read(fields: Fields) -> Conversation:
        messages = read_turns(fields.require(column), fields.name(column))
        if messages[-1]["role"] != "assistant":
            text = f"field '{fields.name(column)}' ends with a message of the {messages[-1]['role']}"
            raise Malformed("nothing to judge", f"{text}; expected the assistant's, which the label judges, last")
        require_trainable(messages[-1:], fields.name(column))
        tools = read_tools(fields.get("tools"), fields.name("tools"))
        messages = with_system(fields, messages)
        return Conversation(messages, tools, trained_from=len(messages) - 1)

    return read


_EXTRAS = ("tools", "system")

PAIR_SHAPES: tuple[Shape[Pair], ...] = (
    Shape(("prompt", *SIDES), (*_EXTRAS, "margin"), _prompted),
    Shape(("conversations", *SIDES), (*_EXTRAS, "margin"), _in_context("conversations")),
    Shape(("messages", *SIDES), (*_EXTRAS, "margin"), _in_context("messages")),
    Shape(("instruction", *SIDES), ("input", "system", "history", "margin"), _ranking),
    Shape(SIDES, (*_EXTRAS, "margin"), _alone),
)
UNPAIRED_SHAPES: tuple[Shape[Judged], ...] = (
    Shape(("prompt", "completion", "label"), _EXTRAS, _judged(answer_in("completion"))),
    Shape(("prompt", "response", "label"), _EXTRAS, _judged(answer_in("response"))),
    Shape(("messages", "label"), _EXTRAS, _judged(_conversation("messages"))),
    Shape(("messages", "kto_tag"), _EXTRAS, _judged(_conversation("messages"), "kto_tag")),
    Shape(("conversations", "kto_tag"), _EXTRAS, _judged(_conversation("conversations"), "kto_tag")),
    Shape(("conversations", "label"), _EXTRAS, _judged(_conversation("conversations"))),
    Shape(("instruction", "output", "kto_tag"), ("input", "system", "history"), _judged(alpaca, "kto_tag")),
    Shape(("instruction", "output", "label"), ("input", "system", "history"), _judged(alpaca)),
)
