r"""The rewards `boxed_…`: another reward, on the content of the last `\boxed{}` alone."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from whet.rewards.answers import last_boxed
from whet.types import Episode


class BoxedReward:
    """Calls a reward with an episode whose response is the last boxed content, or empty without a box.

    A reward that looks for a box itself (`reads_boxes`) gets the box with it.
    """

    def __init__(self, reward: Any) -> None:
        self._reward = reward
        if hasattr(reward, "max_concurrent"):
            self.max_concurrent = reward.max_concurrent
        for method in ("check", "load"):
            if hasattr(reward, method):
                setattr(self, method, getattr(reward, method))

    async def __call__(self, episode: Episode) -> Any:
        content = last_boxed(episode.response)
        inner = copy.copy(episode)
        inner.response, inner.answer = content or "", None
        if content is not None and getattr(self._reward, "reads_boxes", False):
            inner.response = f"\\boxed{{{content}}}"
        value = self._reward(inner)
        return await value if inspect.isawaitable(value) else value
