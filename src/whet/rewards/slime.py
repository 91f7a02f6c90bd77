"""Rewards written for slime, called as they are: `(args, sample)`, or `(args, samples)` for a group."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from whet.rollout.slime import SlimeArgs, SlimeSample
from whet.types import Episode


def slime_reward(function: Callable[..., Any], args: SlimeArgs, options: Mapping[str, Any]) -> Callable[..., Any]:
    """A reward of an episode, or of the episodes of a group, that calls `function` with views of them.

    It is async if the function is.
    """
    if inspect.iscoroutinefunction(function):

        async def judge_async(judged: Episode | Sequence[Episode]) -> Any:
            return await function(args, seen(judged), **options)

        return judge_async

    def judge(judged: Episode | Sequence[Episode]) -> Any:
        return function(args, seen(judged), **options)

    return judge


def seen(judged: Episode | Sequence[Episode]) -> SlimeSample | list[SlimeSample]:
    """Episodes as slime's samples."""
    if isinstance(judged, Episode):
        return SlimeSample.of(judged)
    return [SlimeSample.of(episode) for episode in judged]
