"""The scorer of a run that asks no reward: every finished episode gets 0."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from whet.config.backend import BackendConfig
from whet.errors import RewardError
from whet.types import Episode, Prompt

logger = logging.getLogger(__name__)


class Unjudged:
    """Implements `rollout.protocols.Scorer` without any reward, for credit that a teacher gives."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Every prompt will do."""

    def load(self, backend: BackendConfig) -> None:
        """There is nothing to load."""

    async def score(self, episode: Episode) -> None:
        """Set the reward to 0, unless its environment has set one."""
        if episode.status not in ("aborted", "failed") and episode.reward is None:
            episode.reward = 0.0

    async def score_group(self, episodes: Sequence[Episode]) -> None:
        """Groups are not compared."""

    def report_failures(self, episodes: Sequence[Episode]) -> None:
        """Warn of episodes that failed. Raises RewardError with the first cause if all did."""
        failed = [episode for episode in episodes if episode.status == "failed"]
        if failed and len(failed) == len(episodes):
            raise RewardError(f"all {len(failed)} episodes failed; the first: {failed[0].error}")
        if failed:
            logger.warning("%d of %d episodes failed; the first: %s", len(failed), len(episodes), failed[0].error)

    def report_uniform(self, episodes: Sequence[Episode]) -> None:
        """Rewards of 0 throughout are what is to be expected."""
