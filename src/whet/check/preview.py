"""Rows as the model will see them, with the tokens that the loss looks at in colour."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from whet.data.prepare import preview
from whet.data.prepared import Prepared
from whet.data.prompts import Prompts

TRAINED = "bold green"
MARKS = ("«", "»")
"""Around trained text where there is no colour."""
LONGEST = 1200
"""Characters shown of a stretch of text; its middle is left out."""
SIDES = {1.0: "chosen", 0.0: "rejected"}


def previews(
    part: Prepared | Prompts, tokenizer: PreTrainedTokenizerBase, rows: int, *, colour: bool
) -> Iterator[tuple[str, Text]]:
    """The first few rows of a part: where each stands, and its text; a pair gives two, chosen and rejected."""
    for i in range(min(rows, len(part))):
        if isinstance(part, Prompts):
            yield part[i].id, Text(_short(tokenizer.decode(list(part[i].tokens))), style="dim")
            continue
        samples = part[i].samples
        for number, sample in enumerate(samples):
            label = sample.columns.get("labels")
            side = "" if label is None else SIDES[label] if len(samples) > 1 else _DESIRED[label]
            yield f"{part.origin(i)} {side}".strip(), _coloured(preview(part, tokenizer, i, sample=number), colour)


_DESIRED = {1.0: "desirable", 0.0: "undesirable"}


def _coloured(stretches: list[tuple[str, bool]], colour: bool) -> Text:
    text = Text()
    for words, trained in stretches:
        left, right = MARKS if trained and not colour else ("", "")
        text.append(left + _short(words) + right, style=TRAINED if trained else "dim")
    return text


def _short(text: str) -> str:
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} […] {text[-half:]}"
