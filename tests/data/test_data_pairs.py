"""Rows that hold a judgement: every shape in which pairs and labelled completions come, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from whet.data.pairs import Judged, Pair
from whet.data.problems import Problems
from whet.data.recognise import SHAPES, read_items
from whet.data.rows import parse_sources
from whet.data.shapes import Conversation, Task, Text, TextPair
from whet.errors import DataError

Read = Callable[..., list[Any]]

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "g"), ("assistant", "b"))
)
SYSTEM = {"role": "system", "content": "be"}
TOOL = {"name": "add", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": TOOL}


def pair(prompt: list[dict], **extras: Any) -> Pair:
    """The pair of GOOD and BAD after a prompt of messages."""
    margin, tools = extras.get("margin"), extras.get("tools")
    sides = (Conversation([*prompt, answer], tools, trained_from=len(prompt)) for answer in (GOOD, BAD))
    return Pair(*sides, margin)


@pytest.fixture
def read(write_rows: Callable[..., str]) -> Read:
    """Writes rows to train.jsonl and reads them back as items of a task."""

    def read(*rows: Any, task: Task = "preference", columns: dict[str, str] | None = None) -> list[Any]:
        problems = Problems()
        items = list(read_items(parse_sources(write_rows(*rows)), columns or {}, SHAPES[task], problems))
        problems.raise_any()
        return [placed.item for placed in items]

    return read


PAIRS = {
    "texts": ({"prompt": "q", "chosen": "g", "rejected": "b"}, Pair(TextPair("q", "g"), TextPair("q", "b"))),
    "texts with extras": (
        {"prompt": "q", "chosen": "g", "rejected": "b", "system": "be", "tools": [TOOL], "margin": 2},
        Pair(TextPair("q", "g", "be", tools=[WRAPPED]), TextPair("q", "b", "be", tools=[WRAPPED]), 2.0),
    ),
    "messages": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, pair([USER])),
    "messages, answers as text": ({"prompt": [USER], "chosen": "g", "rejected": "b"}, pair([USER])),
    "a text as prompt, answers as messages": ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, pair([USER])),
    "single messages": ({"prompt": USER, "chosen": GOOD, "rejected": BAD}, pair([USER])),
    "a prompt of several turns": (
        {"prompt": [USER, GOOD, USER], "chosen": [GOOD], "rejected": [BAD]},
        pair([USER, GOOD, USER]),
    ),
    "a prompt that both repeat": (
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        pair([USER]),
    ),
    # As UltraFeedback has it.
    "a text as prompt that both repeat": (
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD], "score_chosen": 1.0},
        pair([USER]),
    ),
    "no prompt, conversations": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, pair([USER])),
    "no prompt, several turns and a system message": (
        {"chosen": [SYSTEM, USER, GOOD, USER, GOOD], "rejected": [SYSTEM, USER, GOOD, USER, BAD]},
        pair([SYSTEM, USER, GOOD, USER]),
    ),
    "no prompt, texts": ({"chosen": "q g", "rejected": "q b"}, Pair(Text("q g"), Text("q b"))),
    "no prompt, with a margin as text": (
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "margin": "0.5", "system": "be", "tools": [TOOL]},
        pair([SYSTEM, USER], margin=0.5, tools=[WRAPPED]),
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "system", "value": "be"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "g"},
            "rejected": [{"from": "gpt", "value": "b"}],
        },
        pair([SYSTEM, USER]),
    ),
    "messages before chosen and rejected": ({"messages": [USER], "chosen": GOOD, "rejected": BAD}, pair([USER])),
    "sharegpt with a system column": (
        {"conversations": [{"from": "human", "value": "q"}], "chosen": GOOD, "rejected": BAD, "system": "be"},
        pair([SYSTEM, USER]),
    ),
    "alpaca": (
        {"instruction": "q", "input": "1", "chosen": "g", "rejected": "b", "history": [["x", "y"]], "margin": 0},
        Pair(TextPair("q\n1", "g", "", (("x", "y"),)), TextPair("q\n1", "b", "", (("x", "y"),)), 0.0),
    ),
}


@pytest.mark.parametrize("row,expected", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("task", ["preference", "reward", "unpaired"])
def test_pairs_of_every_shape_become_one_form(read: Read, row: dict, expected: Pair, task: Task):
    assert read(row, task=task) == [expected]


def test_conversations_that_are_equal_keep_their_last_message_as_the_answer(read: Read):
    (found,) = read({"chosen": [USER, GOOD], "rejected": [USER, GOOD]})
    assert found.chosen == found.rejected == Conversation([USER, GOOD], trained_from=1)


def test_answers_of_several_messages_begin_where_the_conversations_part(read: Read):
    (found,) = read({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, GOOD]})
    assert (found.chosen.trained_from, found.rejected.trained_from) == (1, 1)
    assert found.rejected.messages == [USER, BAD, USER, GOOD]


JUDGED = {
    "prompt and completion": ({"prompt": "q", "completion": "g", "label": True}, Judged(TextPair("q", "g"), True)),
    "prompt and response": ({"prompt": "q", "response": "g", "label": False}, Judged(TextPair("q", "g"), False)),
    "prompt and completion as messages": (
        {"prompt": [USER], "completion": [GOOD], "label": True},
        Judged(Conversation([USER, GOOD], trained_from=1), True),
    ),
    "messages": (
        {"messages": [USER, BAD, USER, GOOD], "label": True, "system": "be"},
        Judged(Conversation([SYSTEM, USER, BAD, USER, GOOD], trained_from=4), True),
    ),
    "messages and kto_tag": (
        {"messages": [USER, GOOD], "kto_tag": False},
        Judged(Conversation([USER, GOOD], trained_from=1), False),
    ),
    "sharegpt and kto_tag": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "g"}], "kto_tag": "true"},
        Judged(Conversation([USER, GOOD], trained_from=1), True),
    ),
    "alpaca and kto_tag": (
        {"instruction": "q", "input": "1", "output": "g", "kto_tag": "False"},
        Judged(TextPair("q\n1", "g"), False),
    ),
}


@pytest.mark.parametrize("row,expected", JUDGED.values(), ids=JUDGED.keys())
def test_judged_completions_of_every_shape_become_one_form(read: Read, row: dict, expected: Judged):
    assert read(row, task="unpaired") == [expected]


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True", " TRUE ", "1"])
def test_a_label_says_yes_in_many_ways(read: Read, value: Any):
    assert read({"prompt": "q", "completion": "g", "label": value}, task="unpaired")[0].label is True


@pytest.mark.parametrize("value", [False, 0, 0.0, "false", "False", "0"])
def test_a_label_says_no_in_many_ways(read: Read, value: Any):
    assert read({"prompt": "q", "completion": "g", "label": value}, task="unpaired")[0].label is False


def test_a_label_may_have_another_name(read: Read):
    row = {"question": "q", "answer": "g", "is_correct": 0}
    columns = {"prompt": "question", "completion": "answer", "label": "is_correct"}
    assert read(row, task="unpaired", columns=columns) == [Judged(TextPair("q", "g"), False)]


JUDGED_REFUSED = {
    "null": ({"label": None}, "field 'label' is null; expected true (desirable) or false; fill it in"),
    "another number": ({"label": 2}, "field 'label' is a number (2); expected true (desirable) or false"),
    "half": ({"label": 0.5}, "field 'label' is a number (0.5)"),
    "another word": ({"label": "yes"}, "field 'label' is text ('yes')"),
    "nothing as text": ({"label": ""}, "field 'label' is text ('')"),
    "a list": ({"label": [1]}, "field 'label' is a list ([1])"),
    "an empty completion": ({"completion": " "}, "field 'completion' is empty"),
    "a prompt that is a number": ({"prompt": 3}, "field 'prompt' is a number (3); expected text"),
}


@pytest.mark.parametrize("change,message", JUDGED_REFUSED.values(), ids=JUDGED_REFUSED.keys())
def test_a_judged_row_that_cannot_be_used_names_field_and_value(read: Read, change: dict, message: str):
    good = {"prompt": "q", "completion": "g", "label": True}
    with pytest.raises(DataError) as caught:
        read(good, {**good, **change}, task="unpaired")
    assert "train.jsonl:2: " + message in str(caught.value)


def test_a_missing_label_is_an_error(read: Read):
    good = {"prompt": "q", "completion": "g", "label": True}
    with pytest.raises(DataError, match=r"train\.jsonl:2: field 'label' is missing \(the row has prompt, completion\)"):
        read(good, {"prompt": "q", "completion": "g"}, task="unpaired")


def test_a_conversation_is_judged_by_its_last_message(read: Read):
    with pytest.raises(DataError, match=r"field 'messages' ends with a message of the user; expected the assistant's"):
        read({"messages": [USER, GOOD, USER], "label": True}, task="unpaired")


PAIRS_REFUSED = {
    "null": ({"prompt": "q", "chosen": None, "rejected": "b"}, "field 'chosen' is null; expected text"),
    "an empty answer": ({"prompt": "q", "chosen": "g", "rejected": ""}, "field 'rejected' is empty"),
    "an empty list": ({"prompt": "q", "chosen": [GOOD], "rejected": []}, "field 'rejected' is an empty list"),
    "a number": ({"prompt": "q", "chosen": 1, "rejected": "b"}, "field 'chosen' is a number (1); expected text"),
    "an unknown role": (
        {"prompt": [USER], "chosen": [{"role": "bot", "content": "g"}], "rejected": [BAD]},
        "field 'chosen[0].role' is text ('bot'); expected one of",
    ),
    "no answer": ({"chosen": [USER, USER], "rejected": [USER, BAD]}, "field 'chosen' has no assistant message"),
    "a side without the prompt": (
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [BAD]},
        "field 'rejected' begins with a message of the assistant, not with the prompt; put the prompt's messages first",
    ),
    "no prompt at all": (
        {"chosen": [GOOD], "rejected": [BAD]},
        "field 'chosen' begins with a message of the assistant",
    ),
    "another prompt": (
        {"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "field 'prompt' ends with 'other', which is not among the messages that chosen and rejected begin with",
    ),
    "text beside messages": (
        {"chosen": "q g", "rejected": [USER, BAD]},
        "field 'chosen' is text ('q g'), but the other of the two holds messages; give both in the same form",
    ),
    "a system message for texts": (
        {"chosen": "q g", "rejected": "q b", "system": "be"},
        "field 'system' is given, but chosen and rejected are plain text; give them as messages",
    ),
    "two system messages": (
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD], "system": "x"},
        "field 'system' is given, and the messages begin with a system message",
    ),
    "a margin too large for float32": (
        {"prompt": "q", "chosen": "g", "rejected": "b", "margin": 1e39},
        "field 'margin' is a number (1e+39); expected a number from -1e+30 to 1e+30; correct it",
    ),
    "a margin in words": (
        {"prompt": "q", "chosen": "g", "rejected": "b", "margin": "much"},
        "field 'margin' is text ('much'); expected a number; correct it",
    ),
    "a margin that is true": (
        {"prompt": "q", "chosen": "g", "rejected": "b", "margin": True},
        "field 'margin' is a boolean (True); expected a number",
    ),
    "a margin without end": (
        '{"prompt": "q", "chosen": "g", "rejected": "b", "margin": Infinity}',
        "field 'margin' is a number (inf); expected a number",
    ),
    "a margin of several": (
        {"prompt": "q", "chosen": "g", "rejected": "b", "margin": [1]},
        "field 'margin' is a list ([1]); expected a number",
    ),
}


@pytest.mark.parametrize("row,message", PAIRS_REFUSED.values(), ids=PAIRS_REFUSED.keys())
def test_a_pair_that_cannot_be_used_names_field_and_value(read: Read, row: Any, message: str):
    with pytest.raises(DataError) as caught:
        read(row)
    assert "train.jsonl:1: " + message in str(caught.value)
