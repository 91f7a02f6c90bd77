"""Messages as OpenAI's API has them to tokens by the model's chat template, and calls of tools back."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from whet.data.chat import ChatTemplate
from whet.data.problems import Malformed
from whet.envs.calls import Reader, spoken
from whet.envs.continuation import Continuation
from whet.envs.tools import reader_of
from whet.errors import ModelError
from whet.serve.refusal import Refusal

CALL = re.compile(r"<tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>")


class Conversations:
    """Renders conversations, and reads the calls that a model writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._read: Reader | None = None
        self._why = "there is no chat template"
        if tokenizer.chat_template:
            try:
                self._read = reader_of(Continuation(tokenizer))
            except (ModelError, Malformed) as error:
                self._why = str(error)

    def tokens(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: Mapping[str, Any]
    ) -> list[int]:
        """The prompt. Raises Refusal for messages or tools that the template does not take."""
        if tools and self._read is None:
            raise Refusal(400, f"the model's tool calls cannot be read: {self._why}", param="tools")
        plain = [_plain(message, i) for i, message in enumerate(messages)]
        try:
            text = ChatTemplate(self.tokenizer, variables).render(plain, tools, generation=True)
        except (ModelError, Malformed) as error:
            raise Refusal(400, str(error), param="messages") from error
        return encoded(self.tokenizer, text, "messages", add_special_tokens=False)

    def message(self, text: str, *, with_tools: bool) -> dict[str, Any]:
        """The assistant's message: its content, and the calls that it makes. What cannot be read stays content."""
        message: dict[str, Any] = {"role": "assistant", "content": text}
        calls = list(self._read(spoken(text))) if with_tools and self._read is not None else []
        if not calls or any(call.error for call in calls):
            return message
        thought = len(text) - len(spoken(text))
        found = CALL.search(text, thought)
        message["content"] = text[: found.start() if found else thought].strip() or None
        message["tool_calls"] = [
            {
                "index": i,
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for i, call in enumerate(calls)
        ]
        return message


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, param: str, **options: bool) -> list[int]:
    """The tokens of a text. Raises Refusal for half of a surrogate pair, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(400, f"{param} cannot be encoded: {error.reason}", param=param) from error
    return list(tokenizer(text, **options)["input_ids"])


def _plain(message: dict[str, Any], index: int) -> dict[str, Any]:
    """A message as chat templates take it: content as one text, arguments of calls as objects."""
    where = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise Refusal(400, f"{where} has no role", param="messages")
    plain = {name: value for name, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        others = [part for part in content if not _is_text(part)]
        if others:
            text = f"{where} has a content part {str(others[0])[:80]}, but only parts of type text with text are taken"
            raise Refusal(400, text, param="messages")
        plain["content"] = "".join(part["text"] for part in content)
    elif content is None:
        plain["content"] = ""
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise Refusal(400, f"{where} has tool_calls {calls!r:.80}, expected a list", param="messages")
        plain["tool_calls"] = [_call(call, where) for call in calls]
    return plain


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _call(call: Any, where: str) -> dict[str, Any]:
    try:
        function = call["function"]
        arguments = function["arguments"]
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
        return {**call, "function": {**function, "arguments": read}}
    except (KeyError, TypeError, ValueError) as error:
        text = f"{where} has a tool call that is none ({error}); it needs function.name and function.arguments, as JSON"
        raise Refusal(400, text, param="messages") from error
