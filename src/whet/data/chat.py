"""The chat template of a tokenizer: conversations as text, and where in it the assistant's turns stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from whet.data.pieces import Rendered, cut
from whet.data.problems import Malformed
from whet.data.shapes import Conversation
from whet.errors import ModelError
from whet.types import Message

# Room for a tag such as <think>: some templates open it in the prompt, while the message holds it too.
_TAG = 16


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, and where in its text the assistant's turns stand."""

    tokenizer: PreTrainedTokenizerBase
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables that the template reads, as `enable_thinking`."""

    def render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None, *, generation: bool = False
    ) -> str:
        """The text of `messages`; with `generation`, up to where the assistant begins its answer.

        Raises ModelError when the tokenizer has no template, Malformed when the template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer {self.tokenizer.name_or_path or ''} has no chat template, but the data has chat "
                f"messages (or data.chat is 'always'); set model.chat_template, or give plain prompts and responses"
            )
        variables = self._variables
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=generation, tokenize=False, **variables
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            remedy = "change the messages, or set model.chat_template"
            raise Malformed(
                "refused by the template", f"the chat template refuses messages of the roles {roles}: {error}; {remedy}"
            ) from error
        assert isinstance(text, str), "one conversation renders as one text"
        return text

    def turns(self, item: Conversation) -> list[Rendered]:
        """The sequences in which each trained assistant turn stands as it would be generated, and once.

        One sequence where the text only grows from turn to turn. A template that rewrites earlier turns
        (Qwen3 takes their `<think>` blocks out) gives one sequence for each history it makes; they share
        their prefixes. Trained are the turn's content and the token that ends it.
        Raises Malformed when the template leaves out part of a trained turn or of the tools, or renders a
        turn otherwise than it would be generated.
        """
        sequences: list[tuple[str, list[tuple[int, int]]]] = []
        for i, message in enumerate(item.messages):
            if message["role"] != "assistant" or i < item.trained_from:
                continue
            text, (start, end) = self._turn(item, i)
            before, spans = sequences[-1] if sequences else ("", [])
            # One sequence holds both turns where the later one was generated after the earlier one as it stands.
            if spans and start >= spans[-1][1] and text.startswith(before[: spans[-1][1]]):
                sequences[-1] = (text, [*spans, (start, end)])
            else:
                sequences.append((text, [(start, end)]))
        require_tools(item, sequences[-1][0])
        return [cut(text, spans) for text, spans in sequences]

    def _turn(self, item: Conversation, i: int) -> tuple[str, tuple[int, int]]:
        """The text up to the assistant message i, and where in it the message and its end-of-turn token stand."""
        message = item.messages[i]
        text = self.render(item.messages[: i + 1], item.tools).removesuffix(self._closing)
        start = self._start(item, i, text)
        _require_rendered(message, text[max(0, start - _TAG) :], i)
        end = len(text.rstrip())
        if text.endswith(self._specials, start, end):
            return text, (start, end)
        text += self._followers["tool" if message.get("tool_calls") else "user"]
        return text, (start, len(text))

    def _start(self, item: Conversation, i: int, text: str) -> int:
        """Where the content of the assistant message i starts in `text`, which ends with that message."""
        if i > 0 and self._prompts:
            prompt = self.render(item.messages[:i], item.tools, generation=True)
        else:
            prompt = self._header(item, i)
        if not text.startswith(prompt):
            shared = len(_shared_prefix(text, prompt))
            raise Malformed(
                "rewritten by the template",
                f"the chat template renders the assistant message {i} as ...{text[shared : shared + 40]!r}, but has it "
                f"generated after ...{prompt[shared : shared + 40]!r}, so the two do not fit; give the message the "
                f"thoughts that the template expects, or set model.chat_template",
            )
        return len(prompt)

    def _header(self, item: Conversation, i: int) -> str:
        """What stands before the content of message i, for a template that has no generation prompt.

        It is what two renderings share that differ in the content alone. A blank after the messages
        before (`[/INST] hello`) belongs to the content: its first token holds it.
        """
        before, letters = item.messages[:i], ("A", "B")
        texts = [self.render([*before, {"role": "assistant", "content": letter}], item.tools) for letter in letters]
        header = _shared_prefix(*texts)
        history = self.render(before, item.tools) if before else ""
        blank = header.startswith(history) and not header[len(history) :].strip()
        return history if blank else header

    @cached_property
    def _variables(self) -> dict[str, Any]:
        """The further variables. Raises ModelError for one that the template never names: it would do nothing."""
        template = self.tokenizer.chat_template
        template = template if isinstance(template, str) else " ".join(dict(template or {}).values())
        for name in self.variables:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise ModelError(
                    f"data.template_kwargs gives {name!r}, but the chat template never reads it; correct the name, "
                    f"leave it out, or set model.chat_template"
                )
        return dict(self.variables)

    @cached_property
    def _prompts(self) -> bool:
        """Whether the template writes a generation prompt."""
        probe = [{"role": "user", "content": "A"}]
        return self.render(probe, generation=True) != self.render(probe)

    @cached_property
    def _specials(self) -> tuple[str, ...]:
        # Not only those marked special: `<|im_end|>` is often added to a base model as an ordinary token.
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        return tuple(sorted({*self.tokenizer.all_special_tokens, *added}))

    @cached_property
    def _closing(self) -> str:
        """A token that stands behind a whole conversation, after the one that ends the turn (Phi-3)."""
        alone, longer = self._probe(), self._probe({"role": "user", "content": "A"})
        for special in self._specials:
            rest = alone.removesuffix(special)
            if rest != alone and longer.startswith(rest) and rest.rstrip().endswith(self._specials):
                return "" if longer.startswith(alone) else special
        return ""

    @cached_property
    def _followers(self) -> dict[str, str]:
        """Who speaks next -> the token that this begins with, right behind the assistant's text.

        Where a turn has no end of its own (GLM), the assistant ends it by giving the floor.
        """
        call = {"type": "function", "function": {"name": "A", "arguments": {}}}
        asked = self._probe(), self._probe({"role": "user", "content": "A"})
        called = self._probe(calls=[call]), self._probe({"role": "tool", "name": "A", "content": "A"}, calls=[call])
        return {"user": self._begins(*asked), "tool": self._begins(*called)}

    def _probe(self, *following: Message, calls: list[dict[str, Any]] | None = None) -> str:
        """A turn and what follows it as the template renders them; empty if it refuses."""
        answer = {"role": "assistant", "content": "" if calls else "A", **({"tool_calls": calls} if calls else {})}
        try:
            return self.render([{"role": "user", "content": "A"}, answer, *following])
        except Malformed:
            return ""

    def _begins(self, text: str, longer: str) -> str:
        """The special token with which `longer` goes on from `text`; empty if it does not."""
        rest = longer[len(text) :] if longer.startswith(text) else ""
        return max((special for special in self._specials if rest.startswith(special)), key=len, default="")


def require_tools(item: Conversation, rendered: str) -> None:
    """Raise Malformed when the template has left out one of the tools."""
    for tool in item.tools or ():
        name = tool["function"]["name"]
        if name not in rendered:
            text = f"the chat template leaves out the tool {name!r}; set model.chat_template to one that renders tools"
            raise Malformed("left out by the template", text)


def _shared_prefix(first: str, second: str) -> str:
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return first[:i]
    return min(first, second, key=len)


def _require_rendered(message: Message, rendered: str, i: int) -> None:
    """Raise Malformed when something of an assistant message is missing from how it is rendered."""
    compact = "".join(rendered.split())
    for name in ("content", "reasoning_content"):
        if "".join(message.get(name, "").split()) not in compact:
            text = f"the chat template leaves out part of the {name} of message {i} ({message[name][:40]!r})"
            raise Malformed("left out by the template", f"{text}; change the message, or set model.chat_template")
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in rendered:
            text = f"the chat template leaves out the call of {call['function']['name']!r} in message {i}"
            raise Malformed(
                "left out by the template", f"{text}; set model.chat_template to one that renders tool calls"
            )
