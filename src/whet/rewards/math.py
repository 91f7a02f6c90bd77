"""The reward `math`: 1 for an answer that is mathematically equal to the label, else 0."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from whet.rewards.answers import equal_numbers, label_text, last_boxed, last_number, tidy
from whet.rewards.math_pool import shared_pool
from whet.types import Episode, Prompt


class MathReward:
    r"""Grade a whole response: its last balanced `\boxed{}`, else its last number, against the label.

    An empty box is a wrong answer. Plain numbers are compared here; everything else symbolically by
    the math-verify library, in worker processes that are killed when they take too long (the answer
    is then wrong).
    """

    reads_boxes = True  # what stands in a box need not be a number

    def __init__(
        self,
        *,
        last_number: Annotated[bool, Field(description="Without a box, grade the last number.")] = True,
        ordered: Annotated[bool, Field(description="`6,5` is not `5,6`; sets have braces.")] = True,
        answer_timeout_s: Annotated[float, Field(gt=0, description="Most seconds for one answer.")] = 5.0,
    ) -> None:
        self._last_number = last_number
        self._ordered = ordered
        self._answer_timeout_s = answer_timeout_s

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt whose label holds no answer."""
        label_text(prompt.label)

    async def __call__(self, episode: Episode) -> float:
        return await self.grade(episode.response, episode.prompt.label)

    async def grade(self, response: str, label: Any) -> float:
        """1.0 or 0.0. Raises ValueError for a label without an answer, RewardError if no worker starts."""
        return await self.grade_answer(self.answer(response) or "", label)

    async def grade_answer(self, answer: str, label: Any) -> float:
        """The same for an answer that was found already; an empty one is wrong, and a box around it is taken off."""
        expected = label_text(label)
        boxed = last_boxed(answer)
        answer = tidy(answer if boxed is None else boxed)
        if not answer:
            return 0.0
        if answer == expected:
            return 1.0
        verdict = equal_numbers(expected, answer)
        if verdict is None:
            verdict = await shared_pool().equal(
                expected, answer, ordered=self._ordered, timeout_s=self._answer_timeout_s
            )
        return float(verdict)

    def answer(self, response: str) -> str | None:
        """The part of a response that is graded, or None without one."""
        boxed = last_boxed(response)
        if boxed is None and self._last_number:
            boxed = last_number(response)
        return boxed
