"""The reward `random`: 0 or 1 by chance, the same for the same episode; for trying out the plumbing."""

from __future__ import annotations

from whet.rollout.seeds import derive_seed
from whet.types import Episode


def coin(episode: Episode, *, seed: int = 0) -> float:
    """Heads or tails, from the seed, the group and the index."""
    return float(derive_seed(seed, episode.group, episode.index) % 2)
