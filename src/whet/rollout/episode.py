"""Playing one episode: the policy and an environment take turns, in tokens, until one of them ends it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from whet.engines.protocol import Engine
from whet.errors import EngineError
from whet.rollout.protocols import Env, Observation, Turn
from whet.rollout.seeds import derive_seed
from whet.rollout.threads import Threads
from whet.types import Completion, Episode, Sampling

logger = logging.getLogger(__name__)

CLOSING_S = 30.0
"""Most seconds that an environment may take to close."""
threads = Threads(64)
"""Where plain (not async) methods of environments run."""

Decode = Callable[[Sequence[int]], str]


def response_decoder(tokenizer: Any, stop_token_ids: Sequence[int] = ()) -> Decode:
    """A function from response tokens to text, without the special and stop tokens at its end.

    Special tokens further in stay: they tell a reward what the policy did.
    """
    closing = frozenset(tokenizer.all_special_ids) | frozenset(stop_token_ids)

    def decode(tokens: Sequence[int]) -> str:
        end = len(tokens)
        while end and tokens[end - 1] in closing:
            end -= 1
        return tokenizer.decode(list(tokens[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode


async def play_episode(
    episode: Episode, env: Env, engine: Engine, sampling: Sampling, *, seed: int, decode: Decode, timeout_s: float
) -> Episode:
    """Play `episode` to its end and set its tokens, response and status.

    `sampling.max_tokens` bounds the sampled tokens of all turns together; each turn samples with a
    seed derived from (seed, group, index, turn). Status: `completed` (the environment ended it),
    `truncated` (the tokens ran out), `aborted` (the engine was told to stop), `failed` (the
    environment raised or took longer than `timeout_s`; `error` says why).
    The environment's own stop texts are added to those of `sampling`; what it counts becomes the episode's
    `info`; it is closed at the end, however that came.
    Raises EngineError if the engine fails, or does not answer one completion within `timeout_s`.
    """
    sampling = replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *getattr(env, "stop", ())))))
    try:
        await _play(episode, env, engine, sampling, seed, timeout_s)
        episode.info = _info(env)
    except _EnvFailure as failure:
        episode.status, episode.error = "failed", str(failure)
    finally:
        await _close(env)
    episode.response = decode(episode.tokens[len(episode.prompt.tokens) :])
    return episode


async def _play(episode: Episode, env: Env, engine: Engine, sampling: Sampling, seed: int, timeout_s: float) -> None:
    observation: Observation = await _ask(env, "reset", timeout_s)
    episode.inject(observation.tokens)
    turn = 0
    while (left := sampling.max_tokens - episode.num_sampled) > 0:
        turn_seed = derive_seed(seed, episode.group, episode.index, turn)
        completion = await _complete(episode, engine, replace(sampling, max_tokens=left, seed=turn_seed), timeout_s)
        episode.extend(completion)
        if completion.finish_reason != "stop":
            episode.status = "truncated" if completion.finish_reason == "length" else "aborted"
            return
        answer: Turn = await _ask(env, "step", timeout_s, completion)
        if answer.done:
            episode.status = "completed"
            return
        episode.inject(answer.observation.tokens)
        turn += 1
    episode.status = "truncated"


async def _complete(episode: Episode, engine: Engine, sampling: Sampling, timeout_s: float) -> Completion:
    try:
        async with asyncio.timeout(timeout_s):
            completion = await engine.generate(episode.tokens, sampling, prefix_key=episode.group)
    except TimeoutError as error:
        raise EngineError(
            f"the engine did not complete episode {episode.group}/{episode.index} (prompt {episode.prompt.id}, "
            f"{len(episode.tokens)} tokens so far, at most {sampling.max_tokens} more) within {timeout_s:g} s; "
            f"raise engine.timeout_s, or lower rollout.max_tokens or the number of completions per step"
        ) from error
    if len(completion.tokens) != len(completion.logprobs):
        raise EngineError(
            f"the engine answered episode {episode.group}/{episode.index} with {len(completion.tokens)} tokens but "
            f"{len(completion.logprobs)} logprobs; every sampled token needs one"
        )
    if not completion.tokens and completion.finish_reason != "abort":
        # A turn without a token would let an environment go on for ever.
        raise EngineError(
            f"the engine answered episode {episode.group}/{episode.index} with no token and finish reason "
            f"{completion.finish_reason!r}; only an aborted completion may be empty"
        )
    return completion


class _EnvFailure(Exception):
    """An environment raised, or took too long."""


async def _ask(env: Env, method: str, timeout_s: float, *arguments: Completion) -> Any:
    name = f"{type(env).__name__}.{method}"
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await _call(getattr(env, method), *arguments)
    except Exception as error:  # an environment is the user's code: any failure of it costs one episode, not the run
        if limit.expired():
            raise _EnvFailure(f"environment {name} did not answer within {timeout_s:g} s") from error
        raise _EnvFailure(f"environment {name} raised {type(error).__name__}: {error}") from error


async def _call(method: Callable[..., Any], *arguments: Completion) -> Any:
    """What a method returns: a coroutine is awaited, a plain one runs in a thread, as it may block."""
    if inspect.iscoroutinefunction(method):
        return await method(*arguments)
    answer = await threads.run(method, *arguments)
    return await answer if inspect.isawaitable(answer) else answer


def _info(env: Env) -> dict[str, float]:
    """What an environment counted, if it counts anything."""
    name = f"{type(env).__name__}.info"
    try:
        counted: Mapping[str, float] = env.info() if hasattr(env, "info") else {}
        info = {str(key): float(value) for key, value in counted.items()}
    except Exception as error:  # as above
        raise _EnvFailure(f"environment {name} raised {type(error).__name__}: {error}") from error
    if wrong := [key for key, value in info.items() if not math.isfinite(value)]:
        raise _EnvFailure(f"environment {name} gave {info[wrong[0]]} for {wrong[0]!r}, expected a number")
    return info


async def _close(env: Env) -> None:
    """Let an environment let go of what it holds; the episode stands, whatever comes of it."""
    if not hasattr(env, "close"):
        return
    name = f"{type(env).__name__}.close"
    try:
        async with asyncio.timeout(CLOSING_S):
            await _call(env.close)
    except Exception as error:  # as above
        logger.warning("environment %s raised %s: %s", name, type(error).__name__, error)
