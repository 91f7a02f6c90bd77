"""From sampled tokens to text, bit by bit: no half characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

HALF = "�"


class Text:
    """The text of one completion as its tokens come.

    What might still become a character, or the beginning of one of the texts `stop`, is held back. From a stop text
    on nothing is told, nor of a stop token (`ends`) that is the last one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        ends: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
        keep_special: bool = False,
    ):
        self.tokenizer, self.ends, self.stop, self.keep_special = tokenizer, ends, tuple(stop), keep_special
        self._tokens: list[int] = []
        self._from = self._read = 0
        self._held = ""
        self._stopped = False

    def add(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """The text that is certain now and was not before; with `last`, all of it."""
        if last and tokens and tokens[-1] in self.ends:
            tokens = tokens[:-1]
        self._tokens.extend(tokens)
        # Tokens are decoded with some before them, as spaces and bytes depend on the neighbours.
        before = self._decode(self._tokens[self._from : self._read])
        now = self._decode(self._tokens[self._from :])
        if len(now) > len(before) and (last or not now.endswith(HALF)):
            self._held += now[len(before) :]
            self._from, self._read = self._read, len(self._tokens)
        return self._certain(last)

    def _certain(self, last: bool) -> str:
        if self._stopped:
            return ""
        places = [place for text in self.stop if (place := self._held.find(text)) >= 0]
        if places:
            self._stopped = True
            return self._held[: min(places)]
        kept = 0 if last else max((_overlap(self._held, text) for text in self.stop), default=0)
        told, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return told

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=not self.keep_special, clean_up_tokenization_spaces=False
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
