"""Calls into an environment: plain methods in threads, each with a limit, and every failure told in words."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from whet.rollout.protocols import Env
from whet.rollout.threads import Threads
from whet.types import Completion

logger = logging.getLogger(__name__)

CLOSING_S = 30.0
"""Most seconds that an environment may take to close."""
threads = Threads(64)
"""Where plain (not async) methods of environments run."""


class EnvFailure(Exception):
    """An environment raised, or took too long."""


async def ask(env: Env, method: str, timeout_s: float, *arguments: Completion) -> Any:
    """What `env.method(*arguments)` answers. Raises EnvFailure."""
    name = f"{type(env).__name__}.{method}"
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await _call(getattr(env, method), *arguments)
    except Exception as error:  # an environment is the user's code: any failure of it costs one episode, not the run
        if limit.expired():
            raise EnvFailure(f"environment {name} did not answer within {timeout_s:g} s") from error
        raise EnvFailure(f"environment {name} raised {type(error).__name__}: {error}") from error


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
        return await method(*arguments)
    answer = await threads.run(method, *arguments)
    return await answer if inspect.isawaitable(answer) else answer
