"""Rendering: rows of either task become text under the settings of `data`."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from whet.config.data import DataConfig
from whet.data.chat import ChatTemplate, require_tools
from whet.data.pairs import Judged, Pair
from whet.data.pieces import Piece, Rendered
from whet.data.problems import Malformed
from whet.data.shapes import Conversation, PromptRow, SFTItem, Text, TextPair
from whet.types import Message


@dataclass(frozen=True)
class Renderer:
    """Rows of either task as text, under the settings of `data`."""

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "template", ChatTemplate(self.tokenizer, self.config.template_kwargs))

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
            require_tools(conversation, text)
            return [Rendered((Piece(text, True),))]
        return self.template.turns(conversation)

    def sides(self, item: Pair | Judged) -> list[Rendered]:
        """The completions of one row with their prompt: the chosen and the rejected, or the one that is judged.

        Raises Malformed, besides what `sequences` does, for a completion that needs more than one sequence.
        """
        items = (item.chosen, item.rejected) if isinstance(item, Pair) else (item.item,)
        rendered = [self.sequences(side) for side in items]
        if any(len(sequences) > 1 for sequences in rendered):
            text = (
                "the chat template rewrites the first turns of a completion of several, so they do not stand together"
            )
            raise Malformed(
                "rewritten by the template",
                f"{text}; let the prompt end with the last question, or change the template",
            )
        return [sequence for sequences in rendered for sequence in sequences]

    def said(self, row: PromptRow) -> str | list[Message]:
        """What a prompt says: text or messages, a system message beside a text included."""
        if not row.system or isinstance(row.prompt, list):
            return row.prompt
        text = self._in_prompt_template(row.prompt)
        return [{"role": "system", "content": row.system}, {"role": "user", "content": text}]

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
        require_tools(item, text)
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


def _wrap(item: TextPair, prompt: str, response: str) -> Conversation:
    messages: list[Message] = [{"role": "system", "content": item.system}] if item.system else []
    for asked, said in item.history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return Conversation(messages, item.tools)
