"""The reward `deepscaler`: like `math`, on what a model says after it has thought."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from whet.rewards.math import MathReward
from whet.types import Episode, Prompt

logger = logging.getLogger(__name__)

END_OF_THOUGHT = "</think>"


class DeepScalerReward:
    """Grades the text after the last `</think>`; a response that never stops thinking is wrong."""

    def __init__(
        self,
        *,
        last_number: Annotated[bool, Field(description="Without a box, grade the last number.")] = True,
        ordered: Annotated[bool, Field(description="`6,5` is not `5,6`; sets have braces.")] = True,
        answer_timeout_s: Annotated[float, Field(gt=0, description="Most seconds for one answer.")] = 5.0,
    ) -> None:
        self._math = MathReward(last_number=last_number, ordered=ordered, answer_timeout_s=answer_timeout_s)

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt whose label holds no answer."""
        self._math.check(prompt)

    async def __call__(self, episode: Episode) -> float:
        _, thought, answer = episode.response.rpartition(END_OF_THOUGHT)
        return await self._math.grade(answer if thought else "", episode.prompt.label)

    def report(self, episodes: Sequence[Episode]) -> None:
        """Warn when no response of a batch has finished a thought: then the reward says nothing of the answers."""
        if episodes and not any(END_OF_THOUGHT in episode.response for episode in episodes):
            logger.warning(
                f"reward 'deepscaler': not one of {len(episodes)} responses has {END_OF_THOUGHT} in it, so all of them "
                "are worth 0, right or wrong; does this model think, and does rollout.max_tokens leave room for it? "
                "For a model that does not, use reward math"
            )
