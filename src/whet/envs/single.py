"""The default environment: one completion, and the episode is over."""

from __future__ import annotations

from typing import Any

from whet.rollout.protocols import Observation, Turn
from whet.types import Completion, Prompt


class SingleTurn:
    """Adds nothing to the prompt and ends with the first completion."""

    def __init__(self, prompt: Prompt, tokenizer: Any) -> None:
        self.prompt = prompt

    async def reset(self) -> Observation:
        return Observation()

    async def step(self, completion: Completion) -> Turn:
        return Turn(done=True)
