"""Calls are read in the forms that models write them in; what cannot be read says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from whet.envs.calls import FORMS, Call, spoken
from whet.envs.continuation import Continuation
from whet.envs.tools import reader_of
from whet.errors import ModelError
from whet.models.tiny import CHAT_TEMPLATE

ADD = Call("add", {"a": 1, "b": "two words"})

WRITTEN = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "two words"}}\n</tool_call>',
    "qwen_coder": "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
    "<parameter=b>\ntwo words\n</parameter>\n</function>\n</tool_call>",
    "glm": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n"
    "<arg_value>two words</arg_value>\n</tool_call>",
    "mistral": '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": "two words"}, "id": "abcdefghi"}]',
    "llama": '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1, "b": "two words"}}',
}


@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_read(form: str):
    assert list(FORMS[form](WRITTEN[form])) == [ADD]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", ["", "the answer is 3", "a < b and {x}"])
def test_what_calls_nothing_is_no_call(form: str, text: str):
    assert list(FORMS[form](text)) == []


@pytest.mark.parametrize("form", ["hermes", "qwen_coder", "glm"])
def test_several_calls_of_a_turn_keep_their_order(form: str):
    twice = f"First:\n{WRITTEN[form]}\n{WRITTEN[form].replace('add', 'mul')}"
    assert [call.name for call in FORMS[form](twice)] == ["add", "mul"]


def test_a_list_of_calls_is_read():
    text = '[TOOL_CALLS][{"name": "add", "arguments": {}}, {"name": "mul", "arguments": "{\\"a\\": 2}"}]'
    assert list(FORMS["mistral"](text)) == [Call("add", {}), Call("mul", {"a": 2})]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('{"name": "add", "arguments": {}', "not valid JSON"),
        ('{"arguments": {}}', 'no "name"'),
        ('{"name": 3}', 'no "name"'),
        ('{"name": "add", "arguments": [1]}', "no object"),
        ('{"name": "add", "arguments": "{"}', "arguments are not valid JSON"),
        ('"add"', 'no "name"'),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_malformed_call_says_why(body: str, why: str):
    (call,) = FORMS["hermes"](f"<tool_call>{body}</tool_call>")
    assert why in (call.error or "") and len(call.error or "") < 300


def test_a_call_that_is_not_closed_is_malformed():
    (call,) = FORMS["hermes"]('<tool_call>{"name": "add"}')
    assert "not closed" in (call.error or "")


@pytest.mark.parametrize(("form", "text"), [("qwen_coder", "<function=a>"), ("glm", "what is this?")])
def test_a_malformed_call_of_another_form_says_why(form: str, text: str):
    (call,) = FORMS[form](f"<tool_call>{text}</tool_call>")
    assert "expected" in (call.error or "")


def test_a_call_within_a_thought_is_none():
    assert spoken(f"<think>maybe {WRITTEN['hermes']}</think>No.") == "No."
    assert spoken("No.") == "No."


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(("tiny", "hermes"), ("qwen3", "hermes"), ("qwen_coder", "qwen_coder"), ("glm", "glm")),
        *(("llama", "llama"), ("mistral", "mistral")),
    ],
)
def test_the_template_tells_the_form(family: str, form: str, chat: Callable[[str], PreTrainedTokenizerFast]):
    assert reader_of(Continuation(chat(family))) is FORMS[form]


def test_a_form_that_is_not_known_is_refused(chat: Callable[[str], PreTrainedTokenizerFast]):
    tokenizer = chat("tiny")
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<tool_call>", "<call>").replace("</tool_call>", "</call>")
    with pytest.raises(ModelError, match=r"<call>.*known forms \(hermes, .*set env\.parser"):
        reader_of(Continuation(tokenizer))
