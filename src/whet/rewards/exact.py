"""The reward `exact`: 1 for a response that is the label, white space around both aside, else 0."""

from __future__ import annotations

from whet.types import Episode, Prompt


class ExactReward:
    """Compares text with text; a label that is a number is compared as it is written in Python."""

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt without a label that can be compared."""
        if not isinstance(prompt.label, str | int | float):
            raise ValueError(f"the label is {prompt.label!r:.80}, expected a text or a number")

    async def __call__(self, episode: Episode) -> float:
        self.check(episode.prompt)
        return float(episode.response.strip() == str(episode.prompt.label).strip())
