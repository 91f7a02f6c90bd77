"""Tools are called in the middle of an episode, and whatever they do, the policy reads of it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from whet.config.base import Plugin
from whet.envs.registry import build_env, check_prompts
from whet.envs.tools import Tools, schemas
from whet.errors import ConfigError, DataError, ModelError
from whet.rollout.episode import Play, response_decoder
from whet.types import Completion, Episode, Prompt, Sampling

Chat = Callable[[str], PreTrainedTokenizerFast]
HERE = __name__


def add(a: int, b: int = 10) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


async def later(text: str) -> dict[str, str]:
    """Answers in its own time.

    Args:
        text: What to say.
    """
    await asyncio.sleep(0.01)
    return {"said": text}


def broken() -> str:
    """Always fails."""
    raise OSError("no such disk")


def endless() -> str:
    """Never answers."""
    threading.Event().wait(2)
    return "too late"


async def endless_async() -> str:
    """Never answers."""
    await asyncio.sleep(60)
    return "too late"


def slow() -> float:
    """Takes its time."""
    time.sleep(0.1)
    return 0.1


def undescribed(a: int) -> int:
    """Says nothing of a."""
    return a


number = 5


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def factory(*functions: str, **options: Any) -> Tools:
    listed = [one if one == "calculator" else f"{HERE}:{one}" for one in functions]
    return Tools(functions=listed, **options)


async def play(tools: Tools, tokenizer: PreTrainedTokenizerFast, *said: str) -> tuple[Episode, list[str]]:
    """The episode in which the policy says this, and what came between, as text."""
    left = list(said)
    eos = tokenizer.eos_token_id

    class Scripted:
        async def generate(self, tokens, sampling, *, prefix_key=None) -> Completion:
            new = [*tokenizer.encode(left.pop(0), add_special_tokens=False), eos]
            return Completion(new, [-1.0] * len(new), "stop")

    prompt = Prompt("p", tokenizer.encode("Q", add_special_tokens=False), "Q")
    episode = Episode(prompt, "g", 0)
    engine: Any = Scripted()
    settings = {"seed": 0, "decode": response_decoder(tokenizer), "timeout_s": 20.0}
    await Play(episode, tools(prompt, tokenizer)).run(engine, Sampling(max_tokens=2000), **settings)
    between, tokens = [], []
    for token, sampled in zip([*episode.tokens[1:], eos], [*episode.loss_mask[1:], True], strict=True):
        if sampled and tokens:
            between.append(tokenizer.decode(tokens))
            tokens = []
        elif not sampled:
            tokens.append(token)
    return episode, between


def outputs(between: list[str]) -> list[str]:
    return [part.partition("<|im_end|>")[0] for text in between for part in text.split("<|im_start|>tool\n")[1:]]


async def test_a_call_is_answered_and_the_answer_is_never_trained(chat: Chat):
    tokenizer = chat("tiny")
    episode, between = await play(factory("add"), tokenizer, "Let me see." + call("add", a=2, b=3), "It is 5.")
    assert episode.status == "completed"
    assert between == ["\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n"]
    sampled = dict(zip(enumerate(episode.sampler_logprobs), episode.loss_mask, strict=True))
    injected = [logprob for (_, logprob), trained in sampled.items() if not trained]
    assert injected == [0.0] * (1 + len(tokenizer.encode(between[0])))
    assert episode.info == {"num_turns": 2.0, "num_calls": 1.0, "num_failed_calls": 0.0}


async def test_history_stays_token_for_token_however_it_was_written(chat: Chat):
    # The tiny tokenizer would never write these calls so: blanks, unclosed thoughts, another order of keys.
    tokenizer = chat("qwen3")
    odd = '<think>hm\n</think>\n\n\n<tool_call>  {"arguments": {"a":1 },\n"name": "add"}</tool_call>  '
    episode, between = await play(factory("add"), tokenizer, odd, "11")
    head = [*tokenizer.encode("Q" + odd, add_special_tokens=False), tokenizer.eos_token_id]
    assert episode.tokens[: len(head)] == head
    assert between == ["\n<|im_start|>user\n<tool_response>\n11\n</tool_response><|im_end|>\n<|im_start|>assistant\n"]


async def test_several_calls_of_a_turn_are_answered_together_in_order(chat: Chat):
    tools = factory("add", "later", "calculator")
    said = call("later", text="né") + call("add", a=1) + call("calculate", expression="48/2")
    episode, between = await play(tools, chat("tiny"), said, "ok")
    assert outputs(between) == ['{"said": "né"}', "11", "24"]
    assert episode.info["num_calls"] == 3.0


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (call("broken"), "Error: broken raised OSError: no such disk"),
        (call("sub", a=1), "Error: there is no tool 'sub'; there are add, broken"),
        (call("add"), "Error: add: missing a required argument: 'a'"),
        (call("add", a=1, c=2), "Error: add: got an unexpected keyword argument 'c'"),
        (call("add", a="x"), 'Error: add raised TypeError: can only concatenate str (not "int") to str'),
        ("<tool_call>{add}</tool_call>", "cannot be read: it is not valid JSON"),
    ],
)
async def test_a_call_that_fails_is_answered_with_the_reason(said: str, told: str, chat: Chat):
    episode, between = await play(factory("add", "broken"), chat("tiny"), said, "Sorry.")
    assert told in outputs(between)[0]
    assert (episode.status, episode.info["num_failed_calls"]) == ("completed", 1.0)


@pytest.mark.parametrize("name", ["endless", "endless_async"])
async def test_a_call_that_hangs_is_given_up(name: str, chat: Chat):
    start = time.monotonic()
    _, between = await play(factory(name, timeout_s=0.05), chat("tiny"), call(name), "Sorry.")
    assert outputs(between) == [f"Error: {name} took longer than 0.05 s"]
    assert time.monotonic() - start < 1.5


async def test_waiting_for_a_thread_is_not_counted(chat: Chat):
    tools = factory("slow", timeout_s=0.5, max_concurrent=1)
    _, between = await play(tools, chat("tiny"), call("slow") * 8, "ok")
    assert outputs(between) == ["0.1"] * 8


async def test_a_long_output_is_cut(chat: Chat):
    _, between = await play(factory("later", max_characters=12), chat("tiny"), call("later", text="a" * 50), "ok")
    assert outputs(between) == ['{"said": "aa... (cut)']


async def test_turns_are_limited_and_calls_of_the_last_are_not_run(chat: Chat):
    episode, between = await play(factory("add", max_turns=2), chat("tiny"), *[call("add", a=1)] * 5)
    assert len(between) == 1 and episode.status == "completed"
    assert episode.info == {"num_turns": 2.0, "num_calls": 1.0, "num_failed_calls": 0.0}


async def test_an_episode_ends_where_tools_would_say_too_much(chat: Chat):
    # Each answer has 22 tokens: \n, start, tool\n, 11, end, \n, start, assistant\n are 1+1+5+2+1+1+1+10.
    episode, between = await play(factory("add", max_output_tokens=50), chat("tiny"), *[call("add", a=1)] * 5)
    assert len(between) == 2 and episode.status == "completed" and episode.info["num_turns"] == 3.0


async def test_a_turn_without_a_call_is_the_last(chat: Chat):
    episode, between = await play(factory("add"), chat("tiny"), "I know: 5", "never said")
    assert between == [] and episode.response == "I know: 5"


# --- what is refused at the start -------------------------------------------------------------------------


def test_schemas_are_read_from_signature_and_docstring():
    (schema,) = schemas([f"{HERE}:add"])
    assert schema == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "The first."},
                    "b": {"type": "integer", "description": "The second."},
                },
                "required": ["a"],
            },
        },
    }


async def test_a_schema_may_be_given_under_a_name_of_its_own(chat: Chat):
    schema = {"name": "echo", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    tools = Tools(functions=[{"use": f"{HERE}:undescribed", "schema": schema}])
    assert tools.tools == [{"type": "function", "function": schema}]
    _, between = await play(tools, chat("tiny"), call("echo", a=3), "ok")
    assert outputs(between) == ["3"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"functions": []}, "env.functions is empty"),
        ({"functions": [f"{HERE}:undescribed"]}, r"env.functions\[0\].*Args:.*schema"),
        ({"functions": [f"{HERE}:number"]}, r"env.functions\[0\].*a int"),
        ({"functions": [f"{HERE}:nothing"]}, "has no 'nothing'"),
        ({"functions": ["calculater"]}, "calculator"),
        ({"functions": [f"{HERE}:add", f"{HERE}:add"]}, r"env.functions\[1\] is called 'add'"),
        ({"functions": [{"path": "x"}]}, "expected the path of a function"),
        ({"functions": [{"use": f"{HERE}:add", "schema": {"title": "x"}}]}, "a function with a name"),
        ({"functions": [f"{HERE}:add"], "max_turns": 0}, "max_turns"),
        ({"functions": [f"{HERE}:add"], "parser": "hermess"}, "hermes"),
        ({"functions": [f"{HERE}:add"], "parser": f"{HERE}:number"}, "env.parser"),
        ({}, "functions"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_start(options: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        build_env(Plugin(use="tools", **options))


def test_a_template_without_tools_is_refused_when_the_tokenizer_is_there(chat: Chat):
    tokenizer = chat("tiny")
    tokenizer.chat_template = tokenizer.chat_template.replace("message.tool_calls or []", "[]")
    config = Plugin(use="tools", functions=[f"{HERE}:add"])
    with pytest.raises(ModelError, match="leaves out the calls"):
        build_env(config, tokenizer)


def test_a_prompt_whose_tools_are_not_there_is_refused():
    fine = Prompt("train/0", [1], "?", metadata={"tools": schemas([f"{HERE}:add"])})
    wrong = Prompt("train/1", [1], "?", metadata={"tools": schemas(["calculator"])})
    check_prompts(factory("add"), [fine])
    with pytest.raises(DataError, match="cannot play 1 prompts; the first is train/1: its tools name 'calculate'"):
        check_prompts(factory("add"), [fine, wrong])


def test_a_parser_of_ones_own_needs_no_known_form(chat: Chat):
    tokenizer = chat("tiny")
    tokenizer.chat_template = tokenizer.chat_template.replace("tool_call>", "call>")
    with pytest.raises(ModelError, match=r"set env\.parser"):
        factory("add").prepare(tokenizer, {})
    factory("add", parser="hermes").prepare(tokenizer, {})
