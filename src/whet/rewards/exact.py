"""The reward `exact`: 1 for an answer that is the label, white space around both aside, else 0."""

from __future__ import annotations

import re

from whet.rewards.f1 import references, words
from whet.types import Episode, Prompt


class ExactReward:
    """Compares text with text; a label that is a number is compared as it is written in Python, of several labels one
    is enough.

    The answer is the response, or the last turn of several. within: the name of a tag, as in `answer`, whose last
    content is compared; without it the reward is 0. normalize: leave case, punctuation and articles out, as SQuAD
    does (arXiv:1606.05250).
    """

    def __init__(self, *, within: str | None = None, normalize: bool = False) -> None:
        self._tag = None if within is None else re.compile(rf"<{re.escape(within)}>(.*?)</{re.escape(within)}>", re.S)
        self._normalize = normalize

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt without a label that can be compared."""
        references(prompt.label)

    def __call__(self, episode: Episode) -> float:
        answer = episode.response if episode.answer is None else episode.answer
        if self._tag is not None:
            found = self._tag.findall(answer)
            if not found:
                return 0.0
            answer = found[-1]
        return float(any(self._read(answer) == self._read(label) for label in references(episode.prompt.label)))

    def _read(self, text: str) -> str | list[str]:
        return words(text) if self._normalize else text.strip()
