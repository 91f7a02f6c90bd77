"""The reward `f1`: how many words an answer shares with the label, as SQuAD counts them."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

from whet.types import Episode, Prompt

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class F1Reward:
    """The harmonic mean of precision and recall over words, from 0 to 1; of several labels the best.

    Case, punctuation and articles do not count.
    Source: Rajpurkar et al. 2016 (arXiv:1606.05250), section 6.1.
    """

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt whose label is neither a text, a number, nor a list of them."""
        references(prompt.label)

    def __call__(self, episode: Episode) -> float:
        return max(token_f1(episode.response, reference) for reference in references(episode.prompt.label))


def references(label: Any) -> list[str]:
    """The answers that a label accepts. Raises ValueError without any."""
    found = label if isinstance(label, list) else [label]
    if not found or not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in found):
        raise ValueError(f"the label is {label!r:.80}, expected a text or a number, or a list of them")
    return [str(one) for one in found]


def token_f1(answer: str, reference: str) -> float:
    """F1 of two texts. Two texts without words are equal."""
    given, wanted = words(answer), words(reference)
    if not given or not wanted:
        return float(given == wanted)
    shared = (Counter(given) & Counter(wanted)).total()
    return 2 * shared / (len(given) + len(wanted))


def words(text: str) -> list[str]:
    """The words that count: lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
