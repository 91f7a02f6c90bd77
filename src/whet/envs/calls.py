"""Calls of tools in the words of a policy: the forms that chat templates write them in, read back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Reader = Callable[[str], Iterable["Call"]]
"""`reader(text) -> calls`, in their order; malformed ones are calls with an `error`."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool that the policy asks for; or, with `error`, what is wrong with how it asked."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def read_hermes(text: str) -> Iterator[Call]:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Hermes, Qwen)."""
    for body, closed in _blocks(text):
        yield from _of_json(body, closed)


def read_qwen_coder(text: str) -> Iterator[Call]:
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>` (Qwen3-Coder)."""
    for body, _ in _blocks(text):
        found = re.fullmatch(r"<function=([^>]+)>(.*)</function>", body, re.DOTALL)
        if found is None:
            yield _malformed("expected <function=NAME> … </function>", body)
            continue
        pairs = re.findall(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", found[2], re.DOTALL)
        yield Call(found[1].strip(), {key.strip(): _value(value) for key, value in pairs})


def read_glm(text: str) -> Iterator[Call]:
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>…</tool_call>` (GLM-4.5)."""
    for body, _ in _blocks(text):
        name = body.partition("<arg_key>")[0].strip()
        if not re.fullmatch(r"[\w.-]+", name):
            yield _malformed("expected the name of a function first", body)
            continue
        pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", body, re.DOTALL)
        yield Call(name, {key.strip(): _value(value) for key, value in pairs})


def read_mistral(text: str) -> Iterator[Call]:
    """`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]` (Mistral)."""
    _, mark, body = text.partition("[TOOL_CALLS]")
    if mark:
        yield from _of_json(body.strip(), closed=True)


def read_llama(text: str) -> Iterator[Call]:
    """`{"name": …, "parameters": {…}}` and nothing beside it (Llama 3)."""
    body = text.strip().removeprefix("<|python_tag|>").strip()
    if body.startswith("{") and re.match(r'{\s*"(name|type|function|parameters)"', body):
        yield from _of_json(body, closed=True)


FORMS: dict[str, Reader] = {
    "hermes": read_hermes,
    "qwen_coder": read_qwen_coder,
    "glm": read_glm,
    "mistral": read_mistral,
    "llama": read_llama,
}


def spoken(text: str) -> str:
    """What was said after thinking: a call within a thought is none."""
    return text.rpartition("</think>")[2]


def _blocks(text: str) -> Iterator[tuple[str, bool]]:
    """What stands within each `<tool_call>`, and whether it was closed."""
    for part in text.split("<tool_call>")[1:]:
        body, closing, _ = part.partition("</tool_call>")
        yield body.strip(), bool(closing)


def _of_json(body: str, closed: bool) -> Iterator[Call]:
    """The call, or the list of calls, that a JSON text holds."""
    if not closed:
        yield _malformed("it is not closed by </tool_call>", body)
        return
    try:
        read = json.loads(body)
    except (json.JSONDecodeError, RecursionError) as error:
        yield _malformed(f"it is not valid JSON ({error})", body)
        return
    for one in read if isinstance(read, list) else [read]:
        yield _of_object(one, body)


def _of_object(read: Any, body: str) -> Call:
    if isinstance(read, dict) and isinstance(read.get("function"), dict):
        read = read["function"]
    name = read.get("name") if isinstance(read, dict) else None
    if not isinstance(name, str):
        return _malformed('it has no "name"', body)
    arguments = read.get("arguments", read.get("parameters", {}))
    if isinstance(arguments, str):  # some models write JSON within JSON
        try:
            arguments = json.loads(arguments)
        except (json.JSONDecodeError, RecursionError) as error:
            return _malformed(f"its arguments are not valid JSON ({error})", body)
    if not isinstance(arguments, dict):
        return _malformed("its arguments are no object", body)
    return Call(name, arguments)


def _malformed(why: str, body: str) -> Call:
    return Call("", error=f"the call {body[:80]!r} cannot be read: {why}")


def _value(text: str) -> Any:
    """A value that is written as JSON if it is no text."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text
