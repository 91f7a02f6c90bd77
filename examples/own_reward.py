"""A reward of one's own: a point for the right number, up to a fifth of one off for going on at length."""

from __future__ import annotations

from whet.rewards.answers import equal_numbers, last_number
from whet.types import Episode


async def brief(episode: Episode, *, most_characters: int = 200) -> dict[str, float]:
    """The parts are logged as `rollout/reward/brief/right` and `…/length`; their sum is the reward."""
    answer = last_number(episode.response)
    right = answer is not None and bool(equal_numbers(str(episode.prompt.label), answer))
    excess = max(0.0, len(episode.response) / most_characters - 1)
    return {"right": float(right), "length": -0.2 * min(1.0, excess)}
