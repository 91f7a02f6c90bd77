"""Words, sentences and paragraphs of a text."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")
_END = re.compile(r"(?:[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？।؟]+[”’」』]*)")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Gen|Col|Capt|Lt|Rev|Hon|vs|etc|cf|al|approx|Inc|Ltd|Co|Corp|No|Fig|Vol|pp"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec)|\b[A-Za-z](?:\.[A-Za-z])*|^\s*\d+)\.$"
)
"""What a full stop after does not end a sentence: abbreviations, initials, the numbers of a list."""


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """Pieces that end in a full stop, question or exclamation mark, or with the text, and hold a word."""
    found, start = [], 0
    for end in _END.finditer(text):
        piece = text[start : end.end()]
        goes_on = text[end.end() :].lstrip()
        lines = piece.rpartition("\n")[2]
        if end.group() == "." and _ABBREVIATION.search(lines) and goes_on:
            continue
        found.append(piece)
        start = end.end()
    return [piece.strip() for piece in (*found, text[start:]) if _WORD.search(piece)]


def paragraphs(text: str) -> list[str]:
    """Pieces between empty lines, those without text left out."""
    return [piece.strip() for piece in re.split(r"\n\s*\n", text) if piece.strip()]
