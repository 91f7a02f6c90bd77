"""Calls into an environment: plain methods in threads, each with a limit, and every failure told in words."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from operator import index
from typing import Any

from whet.rollout.protocols import Env, Observation, Turn
from whet.rollout.threads import Threads, heard
from whet.types import Completion

logger = logging.getLogger(__name__)

CLOSING_S = 30.0
"""Most seconds that an environment may take to close."""
threads = Threads(64)
"""Where plain (not async) methods of environments run."""


class EnvFailure(Exception):
    """An environment raised, or took too long."""


async def ask(env: Env, method: str, timeout_s: float, *arguments: Completion) -> Any:
    """What `env.method(*arguments)` answers, the one that this method should. Raises EnvFailure."""
    name = f"{type(env).__name__}.{method}"
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            answer = await _call(getattr(env, method), *arguments)
    except Exception as error:  # an environment is the user's code: any failure of it costs one episode, not the run
        if limit.expired():
            raise EnvFailure(f"environment {name} did not answer within {timeout_s:g} s") from error
        raise EnvFailure(f"environment {name} raised {type(error).__name__}: {error}") from error
    expected = Turn if method == "step" else Observation
    if not isinstance(answer, expected):
        raise EnvFailure(f"environment {name} returned {answer!r:.80}, expected {expected.__name__}")
    tokens = (answer.observation if isinstance(answer, Turn) else answer).tokens
    try:
        fit = all(index(token) >= 0 for token in tokens)
    except TypeError:
        fit = False
    if not fit:
        raise EnvFailure(f"environment {name} observed {tokens!r:.80}, expected token ids: integers from 0 on")
    return answer


def info_of(env: Env) -> dict[str, float]:
    """What an environment counted, if it counts anything. Raises EnvFailure."""
    name = f"{type(env).__name__}.info"
    try:
        counted: Mapping[str, float] = env.info() if hasattr(env, "info") else {}
        info = {str(key): float(value) for key, value in counted.items()}
    except Exception as error:  # as above
        raise EnvFailure(f"environment {name} raised {type(error).__name__}: {error}") from error
    if wrong := [key for key, value in info.items() if not math.isfinite(value)]:
        raise EnvFailure(f"environment {name} gave {info[wrong[0]]} for {wrong[0]!r}, expected a number")
    return info


async def close(env: Env) -> None:
    """Let an environment let go of what it holds; the episode stands, whatever comes of it."""
    if not hasattr(env, "close"):
        return
    name = f"{type(env).__name__}.close"
    try:
        async with asyncio.timeout(CLOSING_S):
            await _call(env.close)
    except Exception as error:  # as above
        logger.warning("environment %s raised %s: %s", name, type(error).__name__, error)


async def _call(method: Callable[..., Any], *arguments: Completion) -> Any:
    """What a method returns: a coroutine is awaited, a plain one runs in a thread, as it may block."""
    if inspect.iscoroutinefunction(method):
        return await heard(method(*arguments))
    answer = await threads.run(method, *arguments)
    return await heard(answer) if inspect.isawaitable(answer) else answer
