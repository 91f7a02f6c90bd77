"""Rendering: a conversation, a pair or a text becomes pieces of text, each trained or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from whet.config.data import DataConfig
from whet.data.problems import Malformed
from whet.data.shapes import Conversation, PromptRow, SFTItem, Text, TextPair
from whet.errors import ModelError
from whet.types import Message


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is tokenised on its own, so that no token straddles the border of what is trained."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """One sequence as text. `begin`: the tokenizer's own first tokens (BOS) go before it; `end`: EOS after it."""

    pieces: tuple[Piece, ...]
    begin: bool = False
    end: bool = False

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, and where in its text the assistant's turns stand."""

    tokenizer: PreTrainedTokenizerBase

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
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=generation, tokenize=False
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
            text = self.render(item.messages[: i + 1], item.tools)
            start = self._start(item, i, text)
            _require_rendered(message, text[start:], i)
            span = (start, self._end(text, start))
            # The history is as it was when the turns before this one were generated: one sequence holds them all.
            if sequences and text.startswith(sequences[-1][0]) and start >= len(sequences[-1][0]):
                sequences[-1] = (text, [*sequences[-1][1], span])
            else:
                sequences.append((text, [span]))
        _require_tools(item, sequences[-1][0])
        return [Rendered(tuple(_cut(text, spans))) for text, spans in sequences]

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
                f"generated after ...{prompt[shared : shared + 40]!r}, so it cannot be told what to train; change the "
                f"message, or set model.chat_template",
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

    def _end(self, text: str, start: int) -> int:
        """Where the turn ends that starts at `start`: after its end-of-turn token, without blanks behind it."""
        end = len(text.rstrip())
        return end if end > start and text.endswith(self._specials, start, end) else len(text)

    @cached_property
    def _prompts(self) -> bool:
        """Whether the template writes a generation prompt."""
        probe = [{"role": "user", "content": "A"}]
        return self.render(probe, generation=True) != self.render(probe)

    @cached_property
    def _specials(self) -> tuple[str, ...]:
        # Not only those marked special: `<|im_end|>` is often added to a base model as an ordinary token.
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        return tuple({*self.tokenizer.all_special_tokens, *added})


@dataclass(frozen=True)
class Renderer:
    """Rows of either task as text, under the settings of `data`."""

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "template", ChatTemplate(self.tokenizer))

    def sequences(self, item: SFTItem) -> list[Rendered]:
        """The sequences of one row, the trained pieces marked. Plain texts stand as they are, and EOS after them.

        Raises Malformed for what cannot be rendered, ModelError for messages without a chat template.
        """
        everything = self.config.train_on == "all"
        if isinstance(item, Text):
            if self.config.chat == "always":
                text = "the row is plain text without a prompt, but data.chat is 'always'; set it to 'auto'"
                raise Malformed("text to wrap", text)
            return [Rendered((Piece(item.text, True),), begin=True, end=True)]
        if isinstance(item, TextPair):
            prompt, response = self._in_prompt_template(item.prompt), self._in_response_template(item.response)
            if self.config.chat != "always":
                self._require_plain(item)
                pieces = (Piece(prompt, everything), Piece(response, True))
                return [Rendered(pieces, begin=True, end=True)]
            item = _wrap(item, prompt, response)
        conversation = self._conversation(item)
        if everything:
            text = self.template.render(conversation.messages, conversation.tools)
            _require_tools(conversation, text)
            return [Rendered((Piece(text, True),))]
        return self.template.turns(conversation)

    def prompt(self, row: PromptRow) -> Rendered:
        """A prompt up to where the completion begins."""
        messages = row.prompt
        if isinstance(messages, str):
            text = self._in_prompt_template(messages)
            if self.config.chat != "always":
                self._require_plain(row)
                return Rendered((Piece(text, False),), begin=True)
            messages = [{"role": "user", "content": text}]
            messages = [{"role": "system", "content": row.system}, *messages] if row.system else messages
        item = self._conversation(Conversation(messages, row.tools))
        text = self.template.render(item.messages, item.tools, generation=True)
        _require_tools(item, text)
        return Rendered((Piece(text, False),))

    def _conversation(self, item: Conversation) -> Conversation:
        """The conversation with `data.system` before it, unless it has a system message of its own."""
        if self.config.chat == "never":
            text = "the row holds chat messages, but data.chat is 'never'; set it to 'auto', or give plain text"
            raise Malformed("messages refused", text)
        if not self.config.system or item.messages[0]["role"] == "system":
            return item
        system = {"role": "system", "content": self.config.system}
        trained_from = item.trained_from + 1 if item.trained_from else 0
        return Conversation([system, *item.messages], item.tools, trained_from)

    def _in_prompt_template(self, prompt: str) -> str:
        # str.format would trip over the braces of LaTeX and JSON.
        return (self.config.prompt_template or "{prompt}").replace("{prompt}", prompt)

    def _in_response_template(self, response: str) -> str:
        return (self.config.response_template or "{response}").replace("{response}", response)

    def _require_plain(self, item: TextPair | PromptRow) -> None:
        extras = {"system": item.system, "tools": item.tools, "history": getattr(item, "history", ())}
        given = [name for name, value in extras.items() if value]
        if given:
            text = (
                f"the row has {' and '.join(given)}, which only a chat template can render; set data.chat to 'always'"
            )
            raise Malformed("needs a chat template", text)


def _shared_prefix(first: str, second: str) -> str:
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return first[:i]
    return min(first, second, key=len)


def _wrap(item: TextPair, prompt: str, response: str) -> Conversation:
    messages: list[Message] = [{"role": "system", "content": item.system}] if item.system else []
    for asked, said in item.history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return Conversation(messages, item.tools)


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[Piece]:
    """`text` cut at the borders of the trained spans."""
    position = 0
    for start, end in spans:
        yield Piece(text[position:start], False)
        yield Piece(text[start:end], True)
        position = end
    yield Piece(text[position:], False)


def _require_rendered(message: Message, rendered: str, i: int) -> None:
    """Raise Malformed when something of an assistant message is missing from what is trained of it."""
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


def _require_tools(item: Conversation, rendered: str) -> None:
    for tool in item.tools or ():
        name = tool["function"]["name"]
        if name not in rendered:
            text = f"the chat template leaves out the tool {name!r}; set model.chat_template to one that renders tools"
            raise Malformed("left out by the template", text)
