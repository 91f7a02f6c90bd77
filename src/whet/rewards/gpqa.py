r"""The reward `gpqa`: 1 for the right letter of a multiple choice, else 0."""

from __future__ import annotations

import re
from typing import Any

from whet.rewards.answers import last_boxed
from whet.types import Episode, Prompt

LETTERS = "ABCDEFGHIJ"
DEFAULT_CHOICES = 4
# What may stand around a letter: (B), [B], **B**, "B", $B$, \text{B}.
_BEFORE, _AFTER = r"(?:\\text(?:bf)?\{|[(\[{*_\"'“$\s])*", r"(?![\w'’\-/+])"
_ARTICLE = r"(?!(?<=A)\s+(?!(?:because|since|as|is|for|and|or)\b)(?-i:[a-z]))"  # `A proton`, but not `A because`


class GpqaReward:
    r"""Finds the letter that a response settles on, after any thinking, and compares it with the label.

    In order: the last box, the last `answer is B` or `Answer: (B)`, the last letter that stands alone. Capital letters
    only, and `A` before a word is an article. The label is a letter, or one of `metadata.choices`.
    """

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt whose label is no choice."""
        right_letter(prompt)

    def __call__(self, episode: Episode) -> float:
        count = len(choices(episode.prompt)) or DEFAULT_CHOICES
        right = right_letter(episode.prompt)
        return float(chosen_letter(episode.response, max(count, LETTERS.index(right) + 1)) == right)


def choices(prompt: Prompt) -> list[Any]:
    """The texts of the choices, where the row has them in its metadata."""
    found = prompt.metadata.get("choices")
    return list(found) if isinstance(found, list | tuple) else []


def right_letter(prompt: Prompt) -> str:
    """The letter of the right choice. Raises ValueError where the label names none."""
    label = prompt.label.strip() if isinstance(prompt.label, str) else prompt.label
    if label in choices(prompt):
        return LETTERS[choices(prompt).index(label)]
    letter = label.strip("()[].").upper() if isinstance(label, str) else ""
    if len(letter) == 1 and letter in LETTERS:
        return letter
    raise ValueError(f"the label is {prompt.label!r:.80}, expected a letter from A to J, or one of metadata.choices")


def chosen_letter(response: str, num_choices: int = DEFAULT_CHOICES) -> str | None:
    """The letter that a response settles on, or None if it names none of the first `num_choices`."""
    answer = response.rpartition("</think>")[2]
    letter = rf"(?-i:([{LETTERS[:num_choices]}])){_AFTER}{_ARTICLE}"
    boxed = last_boxed(answer)
    if boxed is not None and (match := re.fullmatch(rf"{_BEFORE}{letter}[^\w]*", boxed)):
        return match[1]
    verdict = rf"\banswer\b(?:\s+is|\s*[:=])+(?:\s+(?:option|choice))?{_BEFORE}{letter}"
    for pattern in (verdict, rf"(?<![\w'’\-/+]){letter}"):
        found = re.findall(pattern, answer, re.IGNORECASE)
        if found:
            return found[-1]
    return None
