"""Recognising what shape a file has, mapping its columns, and reading a row in the form of the task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whet.data.problems import Problems
from whet.data.recognise import read_items
from whet.data.rows import parse_sources
from whet.data.shapes import PROMPT_SHAPES, SFT_SHAPES, Conversation, PromptRow, Text, TextPair
from whet.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
TOOL = {"name": "add", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": TOOL}


@pytest.fixture
def read(write_rows: Callable[..., str]) -> Callable[..., list[Any]]:
    """Writes rows to train.jsonl and reads them back as items of the task."""

    def read(*rows: Any, columns: dict[str, str] | None = None, shapes: Any = SFT_SHAPES) -> list[Any]:
        problems = Problems()
        items = list(read_items(parse_sources(write_rows(*rows)), columns or {}, shapes, problems))
        problems.raise_any()
        assert [placed.index for placed in items] == list(range(len(rows)))
        return [placed.item for placed in items]

    return read


SHAPES = {
    "messages": ({"messages": [USER, ASSISTANT]}, Conversation([USER, ASSISTANT])),
    "messages as JSON text": (
        {"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]'},
        Conversation([USER, ASSISTANT]),
    ),
    "messages with a system column": (
        {"messages": [USER, ASSISTANT], "system": "be"},
        Conversation([{"role": "system", "content": "be"}, USER, ASSISTANT]),
    ),
    "messages with parts": (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "ho"}], "name": None}]},
        Conversation([USER, ASSISTANT]),
    ),
    "prompt and response": ({"prompt": "hi", "response": "ho"}, TextPair("hi", "ho")),
    "prompt and completion": ({"prompt": "hi", "completion": "ho"}, TextPair("hi", "ho")),
    "messages as prompt": ({"prompt": [USER], "response": "ho"}, Conversation([USER, ASSISTANT], trained_from=1)),
    "messages as prompt and completion": (
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
        Conversation([USER, ASSISTANT, USER, ASSISTANT], trained_from=3),
    ),
    "alpaca": ({"instruction": "add", "input": "1 2", "output": "3"}, TextPair("add\n1 2", "3")),
    "alpaca without input": ({"instruction": "hi", "input": "", "output": "ho"}, TextPair("hi", "ho")),
    "alpaca with history": (
        {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"},
        TextPair("c", "d", "s", (("a", "b"),)),
    ),
    "text": ({"text": "hi ho"}, Text("hi ho")),
    "messages before text": ({"text": "hi ho", "messages": [USER, ASSISTANT]}, Conversation([USER, ASSISTANT])),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "be"},
        Conversation([{"role": "system", "content": "be"}, USER, ASSISTANT]),
    ),
    "sharegpt with tool calls": (
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "ho"},
            ],
            "tools": '[{"name": "add", "parameters": {"type": "object"}}]',
        },
        Conversation(
            [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
                },
                {"role": "tool", "content": "2"},
                ASSISTANT,
            ],
            [WRAPPED],
        ),
    ),
    "arguments as JSON text": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "x1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
            ],
            "tools": [WRAPPED],
        },
        Conversation(
            [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "x1", "type": "function", "function": {"name": "f", "arguments": {}}}],
                },
            ],
            [WRAPPED],
        ),
    ),
    "an empty list of tools": ({"messages": [USER, ASSISTANT], "tools": "[]"}, Conversation([USER, ASSISTANT])),
}


@pytest.mark.parametrize("row,item", SHAPES.values(), ids=SHAPES.keys())
def test_a_row_is_read_in_the_shape_of_its_columns(read: Callable[..., list[Any]], row: dict, item: Any):
    assert read(row) == [item]


def test_columns_give_the_file_other_names(read: Callable[..., list[Any]]):
    row = {"question": "hi", "answer": "ho", "text": "not this"}
    assert read(row, columns={"prompt": "question", "response": "answer"}) == [TextPair("hi", "ho")]


def test_a_mapped_column_decides_the_shape_over_one_that_happens_to_be_there(read: Callable[..., list[Any]]):
    row = {"messages": [USER, ASSISTANT], "body": "hi ho"}
    assert read(row, columns={"text": "body"}) == [Text("hi ho")]


def test_a_column_that_another_name_has_taken_is_not_read_again(read: Callable[..., list[Any]]):
    row = {"prompt": "hi", "tools": "ho"}
    assert read(row, columns={"response": "tools"}) == [TextPair("hi", "ho")]


def test_names_of_another_task_may_be_mapped(read: Callable[..., list[Any]]):
    columns = {"prompt": "q", "response": "a", "label": "a"}
    assert read({"q": "hi", "a": "ho"}, columns=columns) == [TextPair("hi", "ho")]
    assert read({"q": "hi", "a": "ho"}, columns=columns, shapes=PROMPT_SHAPES) == [PromptRow("hi", "ho")]


PROMPTS = {
    "text": ({"prompt": "hi"}, PromptRow("hi")),
    "label 0": ({"prompt": "hi", "label": 0}, PromptRow("hi", 0)),
    "label false": ({"prompt": "hi", "label": False}, PromptRow("hi", False)),
    "label null": ({"prompt": "hi", "label": None}, PromptRow("hi", None)),
    "messages": ({"prompt": [USER], "system": "be"}, PromptRow([{"role": "system", "content": "be"}, USER])),
    "metadata and tools": (
        {"prompt": [USER], "metadata": {"k": 1}, "tools": [TOOL]},
        PromptRow([USER], None, {"k": 1}, [WRAPPED]),
    ),
    "metadata as JSON text": ({"prompt": "hi", "metadata": '{"k": 1}'}, PromptRow("hi", None, {"k": 1})),
    "system of a plain prompt": ({"prompt": "hi", "system": "be"}, PromptRow("hi", system="be")),
}


@pytest.mark.parametrize("row,item", PROMPTS.values(), ids=PROMPTS.keys())
def test_a_prompt_row_keeps_label_metadata_and_tools(read: Callable[..., list[Any]], row: dict, item: PromptRow):
    (found,) = read(row, shapes=PROMPT_SHAPES)
    assert found == item
    assert type(found.label) is type(item.label)


def ask(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


FAULTS = {
    "null": ({"prompt": "a", "response": None}, r"train\.jsonl:2: field 'response' is null; expected text; fill it in"),
    "number": (
        {"prompt": "a", "response": 4},
        r":2: field 'response' is a number \(4\); expected text; write it in quotes",
    ),
    "missing": ({"prompt": "a"}, r":2: field 'response' is missing \(the row has prompt\); fill it in or remove"),
    "blank": ({"prompt": "a", "response": " \n"}, r":2: field 'response' is empty; expected text; fill it in"),
    "half a character": (
        '{"prompt": "a\\ud83d", "response": "b"}',
        r":2: field 'prompt' holds half a character \(\\ud83d at 1\)",
    ),
    "broken JSON": (
        '{"prompt": "a", "response": }',
        r":2: broken JSON at column 29: .*; correct the line or remove it",
    ),
}


@pytest.mark.parametrize("row,message", FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_row_names_file_line_field_value_and_remedy(read: Callable[..., list[Any]], row: Any, message: str):
    with pytest.raises(DataError, match=message):
        read({"prompt": "fine", "response": "fine"}, row)


CHAT_FAULTS = {
    "not a list": ({"messages": {}}, r"field 'messages' is an object \({}\); expected a list of messages"),
    "no messages": (ask(), r"field 'messages' is an empty list; expected messages"),
    "not an object": (
        ask(USER, "ho"),
        r"field 'messages\[1\]' is text \('ho'\); expected an object with role and content",
    ),
    "unknown role": (
        ask({"role": "bot", "content": ""}),
        r"'messages\[0\]\.role' is text \('bot'\); expected one of system",
    ),
    "sharegpt in messages": (
        ask({"from": "human", "value": ""}),
        r"with from and value belong in a column 'conversations'",
    ),
    "no content": (ask({"role": "user"}), r"field 'messages\[0\]\.content' is null; expected text"),
    "an image": (
        ask({"role": "user", "content": [{"type": "image"}]}),
        r"content\[0\]' is an object .* part of type text",
    ),
    "no assistant": (
        ask(USER),
        r"'messages' has no assistant message \(roles: user\), so no token of it would be trained",
    ),
    "a silent assistant": (
        ask(USER, {"role": "assistant", "content": ""}),
        r"'messages\[1\]' is an assistant message with",
    ),
    "two systems": (
        ask({"role": "system", "content": "a"}, USER, ASSISTANT, system="b"),
        r"'system' is given, and the mes",
    ),
    "tools": (
        ask(USER, ASSISTANT, tools=[{"x": 1}]),
        r"field 'tools\[0\]' is an object .*; expected a function with a name",
    ),
    "tools not JSON": (ask(USER, ASSISTANT, tools="[{"), r"field 'tools' is text \('\[{'\), which is not JSON"),
    "a call without a name": (
        ask(USER, {"role": "assistant", "tool_calls": [{"function": {}}]}),
        r"field 'messages\[1\]\.tool_calls' holds an object .*; expected a call with name and arguments",
    ),
    "arguments that are no object": (
        ask(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}),
        r"field 'messages\[1\]\.tool_calls\.arguments' is a list \(\[1\]\); expected an object",
    ),
    "an unknown speaker": (
        {"conversations": [{"from": "me", "value": ""}]},
        r"'conversations\[0\]\.from' is text \('me'\)",
    ),
    "a call that is no JSON": (
        {"conversations": [{"from": "function_call", "value": "add(1)"}]},
        r"field 'conversations\[0\]' is text \('add\(1\)'\), which is not JSON",
    ),
    "an odd history": (
        {"instruction": "a", "output": "b", "history": ["x"]},
        r"expected a list of \[prompt, response\]",
    ),
}


@pytest.mark.parametrize("row,message", CHAT_FAULTS.values(), ids=CHAT_FAULTS.keys())
def test_a_faulty_conversation_names_the_message(read: Callable[..., list[Any]], row: Any, message: str):
    with pytest.raises(DataError, match=rf"train\.jsonl:1: .*{message}"):
        read(row)


PROMPT_FAULTS = {
    "number": ({"prompt": 3}, r"field 'prompt' is a number \(3\); expected text"),
    "empty": ({"prompt": ""}, r"field 'prompt' is empty"),
    "answered": (
        {"prompt": [USER, ASSISTANT]},
        r"field 'prompt' ends with an assistant message; expected a user or tool",
    ),
    "metadata": ({"prompt": "a", "metadata": [1]}, r"field 'metadata' is a list \(\[1\]\); expected an object"),
}


@pytest.mark.parametrize("row,message", PROMPT_FAULTS.values(), ids=PROMPT_FAULTS.keys())
def test_a_faulty_prompt_is_never_skipped(read: Callable[..., list[Any]], row: Any, message: str):
    with pytest.raises(DataError, match=rf"train\.jsonl:2: {message}"):
        read({"prompt": "fine"}, row, shapes=PROMPT_SHAPES)


def test_errors_speak_of_the_names_in_the_file(read: Callable[..., list[Any]]):
    rows = [{"question": "a", "answer": "b"}] * 16 + [{"question": "a", "answer": None}]
    with pytest.raises(
        DataError, match=r"train\.jsonl:17: field 'answer' is null; expected text; fill it in or remove"
    ):
        read(*rows, columns={"prompt": "question", "response": "answer"})


def test_a_missing_column_lists_what_is_there_and_suggests_a_mapping(read: Callable[..., list[Any]]):
    with pytest.raises(DataError) as caught:
        read({"question": "a", "answer": "b"})
    assert str(caught.value).endswith(
        "train.jsonl has the columns question, answer; expected messages · conversations · prompt + response · "
        "prompt + completion · instruction + output · text; name yours in data.columns, as in "
        "{prompt: question, response: answer}"
    )


def test_a_missing_column_without_a_likely_one_shows_where_to_put_it(read: Callable[..., list[Any]]):
    with pytest.raises(
        DataError, match=r"the columns x, y; .*{prompt: your_prompt_column, response: your_response_column}"
    ):
        read({"x": "a", "y": "b"})


def test_a_mapped_column_that_is_not_there_names_the_nearest(read: Callable[..., list[Any]]):
    with pytest.raises(
        DataError, match=r"maps prompt to 'qestion', but .* has the columns question, .*mean 'question'\?"
    ):
        read({"question": "a", "answer": "b"}, columns={"prompt": "qestion", "response": "answer"})


def test_a_mapped_name_that_is_none_of_ours_names_the_nearest(read: Callable[..., list[Any]]):
    with pytest.raises(DataError, match=r"maps 'respons', which is no column of ours; did you mean response\?"):
        read({"question": "a", "answer": "b"}, columns={"respons": "answer"})


def test_the_real_files_are_recognised(shared_data: Path):
    def first(name: str, columns: dict[str, str], shapes: Any) -> tuple[Any, int]:
        problems = Problems()
        items = [
            placed.item for placed in read_items(parse_sources(str(shared_data / name)), columns, shapes, problems)
        ]
        problems.raise_any()
        return items[0], len(items)

    pair, count = first("gsm8k_train.jsonl", {"prompt": "question", "response": "answer"}, SFT_SHAPES)
    assert isinstance(pair, TextPair) and pair.response.endswith("#### 72") and count == 7473
    row, count = first("gsm8k_test.jsonl", {"prompt": "question", "label": "answer"}, PROMPT_SHAPES)
    assert row.label.endswith("#### 18") and count == 1319
    pair, _ = first("alpaca_en_demo.json", {}, SFT_SHAPES)
    assert isinstance(pair, TextPair) and pair.prompt == "Describe a process of making crepes."
    chat, count = first("glaive_toolcall_en_demo.json", {}, SFT_SHAPES)
    assert [message["role"] for message in chat.messages][:6] == ["user", "assistant"] * 2 + ["tool", "assistant"]
    assert chat.messages[3]["tool_calls"][0]["function"]["name"] == "search_recipes"
    assert chat.tools[0]["function"]["name"] == "search_recipes" and count == 300
