"""Rendered text, in pieces that are trained and pieces that are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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


def cut(text: str, spans: Sequence[tuple[int, int]]) -> Rendered:
    """`text` cut at the borders of the trained spans, which ascend and do not overlap."""
    pieces, position = [], 0
    for start, end in spans:
        pieces += [Piece(text[position:start], False), Piece(text[start:end], True)]
        position = end
    return Rendered((*pieces, Piece(text[position:], False)))
