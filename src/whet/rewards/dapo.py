"""The reward `dapo`: 1 for a right last line `Answer: …`, else -1."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from whet.rewards.math import MathReward
from whet.types import Episode, Prompt

TAIL_CHARACTERS = 300
_ANSWER = re.compile(r"answer[ \t]*:[ \t]*([^\n]*)", re.IGNORECASE)


class DapoReward:
    """Grades what follows the last `Answer:` within the last 300 characters of a response, as mathematics.

    Source: DAPO, Yu et al. 2025 (arXiv:2503.14476), section 2.4.
    """

    def __init__(
        self,
        *,
        ordered: Annotated[bool, Field(description="`6,5` is not `5,6`; sets have braces.")] = True,
        answer_timeout_s: Annotated[float, Field(gt=0, description="Most seconds for one answer.")] = 5.0,
    ) -> None:
        self._math = MathReward(last_number=False, ordered=ordered, answer_timeout_s=answer_timeout_s)

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt whose label holds no answer."""
        self._math.check(prompt)

    async def __call__(self, episode: Episode) -> dict[str, float | str]:
        """`score` is 1 or -1, `acc` 1 or 0, and `pred` what was graded, empty where there was nothing."""
        found = _ANSWER.findall(episode.response[-TAIL_CHARACTERS:])
        pred = found[-1].strip(" \t*") if found else ""  # `**Answer:** 4` is written too
        right = await self._math.grade_answer(pred, episode.prompt.label)
        return {"score": 2.0 * right - 1.0, "acc": right, "pred": pred}
