"""Text that an environment adds to an episode, as tokens that stand behind those which are there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from whet.data.encode import Encoder
from whet.data.pieces import Piece, Rendered


@dataclass(frozen=True)
class Inserter:
    """Tokenises new text on its own, as the text in the middle of a sequence that it will be."""

    tokenizer: PreTrainedTokenizerBase

    def tokens(self, text: str, *, behind: str = "\n") -> list[int]:
        """The tokens of `text` where it stands behind other text; some tokenizers write beginnings differently."""
        encoded = self._encoder.encode([Rendered((Piece(behind, False), Piece(text, True)))])[0]
        return encoded.tokens[encoded.prompt :].tolist()

    def harmless(self, text: str) -> str:
        """Text from outside, in which what spells a special token is broken up: only templates may write those."""
        for special in self.specials:
            if special in text and special[0] in "<[":
                text = text.replace(special, f"{special[0]} {special[1:]}")
        return text

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @cached_property
    def specials(self) -> frozenset[str]:
        """Special and added tokens: `<|im_end|>` is often added to a base model as an ordinary one."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        return frozenset({*self.tokenizer.all_special_tokens, *added})

    @cached_property
    def marked(self) -> frozenset[str]:
        """Only those marked special."""
        marked = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return frozenset({*self.tokenizer.all_special_tokens, *marked})
