"""The reward `exact`: 1 for a response that is the label, white space around both aside, else 0."""

from __future__ import annotations

from whet.types import Episode


def exact(episode: Episode) -> float:
    """Raises ValueError for a prompt without a label."""
    if episode.prompt.label is None:
        raise ValueError("the prompt has no label; check data.columns")
    return float(episode.response.strip() == str(episode.prompt.label).strip())
