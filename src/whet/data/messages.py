"""Chat messages and tools in one form, whichever of the usual forms a row has them in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from whet.data.formats import describe
from whet.data.problems import Malformed
from whet.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool")

# ShareGPT: who speaks -> role. A function call is an assistant message that holds no text.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


def read_messages(value: Any, field: str) -> list[Message]:
    """Messages with `role` and `content` (OpenAI's form), as objects or as JSON text.

    Content becomes text, arguments of tool calls become objects, keys without a value are left out.
    Raises Malformed naming `field` and the message.
    """
    messages = _list(value, field, "messages")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(messages)]


def read_sharegpt(value: Any, field: str) -> list[Message]:
    """Messages with `from` and `value` (ShareGPT's form), function calls and observations included."""
    messages: list[Message] = []
    for i, turn in enumerate(_list(value, field, "messages")):
        where = f"{field}[{i}]"
        if not isinstance(turn, dict):
            raise Malformed(
                "wrong type", f"field '{where}' is {describe(turn)}; expected an object with from and value"
            )
        speaker = turn.get("from")
        if speaker not in _SPEAKERS:
            known = ", ".join(_SPEAKERS)
            raise Malformed("unknown role", f"field '{where}.from' is {describe(speaker)}; expected one of {known}")
        if speaker == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _calls(turn.get("value"), where)})
        else:
            messages.append({"role": _SPEAKERS[speaker], "content": text_of(turn.get("value"), f"{where}.value")})
    return messages


def read_turns(value: Any, field: str) -> list[Message]:
    """Messages in either form, told by their keys; a single one may stand without a list around it."""
    turns = json_of(value, field) if isinstance(value, str) else value
    turns = [turns] if isinstance(turns, dict) else turns
    sharegpt = isinstance(turns, list) and any(isinstance(turn, dict) and "from" in turn for turn in turns[:1])
    return (read_sharegpt if sharegpt else read_messages)(turns, field)


def read_tools(value: Any, field: str) -> list[dict[str, Any]] | None:
    """Descriptions of functions, as objects or as JSON text, in OpenAI's form; None when there are none."""
    if value in (None, "", []):
        return None
    tools = []
    for i, tool in enumerate(_list(value, field, "tools", empty=True)):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed("wrong type", f"field '{field}[{i}]' is {describe(tool)}; expected a function with a name")
        tools.append({"type": "function", "function": function})
    return tools or None


def text_of(value: Any, field: str, *, empty: bool = True) -> str:
    """`value` if it is text. Raises Malformed otherwise, or when it is blank and `empty` is false."""
    if value is None:
        raise Malformed("null", f"field '{field}' is null; expected text; fill it in or remove the row")
    if not isinstance(value, str):
        raise Malformed("wrong type", f"field '{field}' is {describe(value)}; expected text; write it in quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"\\u{ord(value[error.start]):04x}"
        text = f"field '{field}' holds half a character ({code} at {error.start}); expected text; correct or remove it"
        raise Malformed("not text", text) from error
    if not empty and not value.strip():
        raise Malformed("empty", f"field '{field}' is empty; expected text; fill it in or remove the row")
    return value


def require_trainable(messages: Sequence[Message], field: str) -> None:
    """Raise Malformed unless an assistant speaks, and never says nothing."""
    turns = [(i, message) for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        roles = ", ".join(message["role"] for message in messages)
        text = f"field '{field}' has no assistant message (roles: {roles}), so no token of it would be trained"
        raise Malformed("nothing to train", f"{text}; add the answer or remove the row")
    for i, message in turns:
        if not (message["content"].strip() or message.get("reasoning_content") or message.get("tool_calls")):
            text = f"field '{field}[{i}]' is an assistant message without content; fill it in or remove the row"
            raise Malformed("empty", text)


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise Malformed(
            "wrong type", f"field '{where}' is {describe(message)}; expected an object with role and content"
        )
    role = message.get("role")
    if role not in ROLES:
        text = f"field '{where}.role' is {describe(role)}; expected one of {', '.join(ROLES)}"
        hint = "; messages with from and value belong in a column 'conversations'" if "from" in message else ""
        raise Malformed("unknown role", text + hint)
    content, calls = message.get("content"), message.get("tool_calls")
    if content is None and (calls or message.get("reasoning_content")):
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    clean = {key: value for key, value in message.items() if value is not None}
    clean["content"] = text_of(content, f"{where}.content")
    if "reasoning_content" in clean:
        clean["reasoning_content"] = text_of(clean["reasoning_content"], f"{where}.reasoning_content")
    clean.pop("tool_calls", None)
    if calls:
        clean["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    return clean


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        return text_of(part.get("text"), f"{where}.text")
    raise Malformed("wrong type", f"field '{where}' is {describe(part)}; expected a part of type text")


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, with the arguments as an object: templates write JSON themselves."""
    calls = json_of(value, where) if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls:
        raise Malformed("wrong type", f"field '{where}' is {describe(value)}; expected a call with name and arguments")
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            text = f"field '{where}' holds {describe(call)}; expected a call with name and arguments"
            raise Malformed("wrong type", text)
        arguments = function.get("arguments", {})
        arguments = json_of(arguments, f"{where}.arguments") if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict):
            text = f"field '{where}.arguments' is {describe(arguments)}; expected an object"
            raise Malformed("wrong type", text)
        function = {"name": function["name"], "arguments": arguments}
        result.append({**({"id": call["id"]} if call.get("id") else {}), "type": "function", "function": function})
    return result


def _list(value: Any, field: str, what: str, *, empty: bool = False) -> list[Any]:
    if value is None:
        raise Malformed("null", f"field '{field}' is null; expected a list of {what}; fill it in or remove the row")
    parsed = json_of(value, field) if isinstance(value, str) else value
    if not isinstance(parsed, list):
        raise Malformed("wrong type", f"field '{field}' is {describe(parsed)}; expected a list of {what}")
    if not parsed and not empty:
        raise Malformed("empty", f"field '{field}' is an empty list; expected {what}; fill it in or remove the row")
    return parsed


def json_of(text: str, field: str) -> Any:
    """The value of a field that holds JSON as text, as CSV files must."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        message = f"field '{field}' is {describe(text)}, which is not JSON: {error}; correct it or remove the row"
        raise Malformed("broken JSON", message) from error
