"""The scorer: calls the reward functions of a run on an episode and makes one number of what they say."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from whet.config.backend import BackendConfig
from whet.errors import DataError, RewardError
from whet.rollout.protocols import Reward
from whet.types import Episode, Prompt

logger = logging.getLogger(__name__)

# More at a time would only take each other's share of the interpreter, and run into their limits.
MAX_THREADS = 16
EXCERPT_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class NamedReward:
    """One reward function, the name it is reported under, its weight, and the limit for one call."""

    name: str
    reward: Reward
    weight: float = 1.0
    timeout_s: float = 60.0


class RewardScorer:
    """Scores episodes by a weighted sum of rewards. Implements `rollout.protocols.Scorer`.

    Async rewards run on the event loop, all others in threads, at most 16 at a time. A thread that
    runs into its limit is left behind: it cannot be stopped, but nothing waits for it any more.
    A reward with an attribute `max_concurrent` is called by so many at a time; its time counts from then.
    """

    def __init__(self, rewards: Sequence[NamedReward]) -> None:
        assert len({reward.name for reward in rewards}) == len(rewards) > 0, "rewards have names of their own"
        self.rewards = tuple(rewards)
        self._num_uniform = 0
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Ask the rewards whether they can judge these prompts at all, before a model is loaded.

        Raises DataError with the first prompt that one of them cannot judge, and how many there are.
        """
        for named in self.rewards:
            check = getattr(named.reward, "check", None)
            faults = [fault for prompt in prompts if (fault := fault_of(check, prompt))] if check else []
            if faults:
                raise DataError(
                    f"reward '{named.name}' cannot judge {len(faults)} prompts; the first is {faults[0]}; correct "
                    f"the rows, or name the column that holds the answer in data.columns, as in {{label: answer}}"
                )

    def load(self, backend: BackendConfig) -> None:
        """Let rewards that have a method `load` load their models as the run loads its own."""
        for named in self.rewards:
            if (load := getattr(named.reward, "load", None)) is not None:
                load(backend)

    async def score(self, episode: Episode) -> None:
        """Set `reward` to the weighted sum, and `rewards` to each function's own value by its name.

        The parts of a dict are recorded as `name/part`. If any function fails, the episode is marked
        as failed with the reason in `error`. Aborted and failed episodes are left as they are.
        """
        if episode.status in ("aborted", "failed"):
            return
        outcomes = await asyncio.gather(*(self._outcome(reward, episode) for reward in self.rewards))
        failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if failures:
            episode.status, episode.error = "failed", "; ".join(failures)
            return
        episode.rewards = {name: value for outcome in outcomes for name, value in outcome.items()}
        episode.reward = sum(reward.weight * episode.rewards[reward.name] for reward in self.rewards)

    def report_failures(self, episodes: Sequence[Episode]) -> None:
        """Say how many episodes failed, and the first cause with its prompt.

        Raises RewardError with that cause if every episode that was not aborted failed.
        """
        played = [episode for episode in episodes if episode.status != "aborted"]
        failed = [episode for episode in played if episode.status == "failed"]
        if not failed:
            return
        first = f"the first answered {prompt_in_words(failed[0].prompt)}: {failed[0].error}"
        if len(failed) == len(played):
            raise RewardError(f"all {len(failed)} episodes of this step failed, so nothing is left to go on; {first}")
        logger.warning(f"{len(failed)} of {len(played)} episodes failed and are left out; {first}")

    def report_uniform(self, episodes: Sequence[Episode]) -> None:
        """Say so when every episode of a step has the same reward, the first, second, fourth … time in a row."""
        scored = [episode.reward for episode in episodes if episode.reward is not None]
        self._num_uniform = self._num_uniform + 1 if len(scored) > 1 and len(set(scored)) == 1 else 0
        if self._num_uniform.bit_count() == 1:
            logger.warning(
                f"all {len(scored)} episodes have the same reward, {scored[0]:g} (steps in a row: {self._num_uniform}):"
                f" there is nothing to learn from; look at the responses and at {self._names()}"
            )

    def _names(self) -> str:
        return ", ".join(f"reward '{reward.name}'" for reward in self.rewards)

    async def _outcome(self, reward: NamedReward, episode: Episode) -> dict[str, float] | str:
        """What one function says of an episode, by name, or why it failed."""
        try:
            return named_numbers(reward.name, await self._call(reward, episode))
        except _Failure as failure:
            return f"reward '{reward.name}' {failure}"
        except Exception as error:  # rewards are the user's code: a failure costs one episode, not the run
            return f"reward '{reward.name}' raised {type(error).__name__}: {error}"

    async def _call(self, reward: NamedReward, episode: Episode) -> Any:
        if is_async(reward.reward):
            limit = getattr(reward.reward, "max_concurrent", None)
            async with self._slot(reward.name, limit) if limit else nullcontext():
                return await within(reward.timeout_s, reward.reward(episode))
        async with self._slot("", MAX_THREADS):
            value = await within(reward.timeout_s, asyncio.wrap_future(in_thread(reward.reward, episode)))
        return await within(reward.timeout_s, value) if inspect.isawaitable(value) else value

    def _slot(self, kind: str, limit: int) -> asyncio.Semaphore:
        """What lets `limit` callers of a kind in at a time; made anew for each event loop."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._slots, self._loop = {}, loop
        return self._slots.setdefault(kind, asyncio.Semaphore(limit))


class _Failure(Exception):
    """A reward function that took too long, or gave what is no reward; the message says which."""


def named_numbers(name: str, value: Any) -> dict[str, float]:
    """What a reward function returned, as numbers: its value under `name`, parts of a dict as `name/part`.

    A dict's value is its `score`, or the sum of its parts.
    """
    if not isinstance(value, Mapping):
        return {name: number(value)}
    if not value:
        raise _Failure("returned an empty dict")
    parts = {str(key): number(part) for key, part in value.items()}
    total = parts["score"] if "score" in parts else sum(parts.values())
    return {name: total, **{f"{name}/{key}": part for key, part in parts.items()}}


def number(value: Any) -> float:
    """A finite float. Numbers of numpy and torch will do; text will not."""
    if not hasattr(value, "__float__"):
        raise _Failure(f"returned {value!r:.80}, expected a number or a dict of numbers")
    result = float(value)
    if not math.isfinite(result):
        raise _Failure(f"returned {result}, which is no reward")
    return result


def is_async(reward: Reward) -> bool:
    """Whether calling a reward gives a coroutine: an async function, or an object with an async `__call__`."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004


async def within(timeout_s: float, awaitable: Awaitable[Any]) -> Any:
    """The result of an awaitable, under a limit."""
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await awaitable
    except TimeoutError as error:
        if limit.expired():
            raise _Failure(f"took longer than its timeout_s of {timeout_s:g} s") from error
        raise


def fault_of(check: Callable[[Prompt], None], prompt: Prompt) -> str | None:
    """What a reward finds wrong with a prompt."""
    try:
        check(prompt)
    except ValueError as error:
        return f"{prompt_in_words(prompt)}: {error}"
    return None


def in_thread(function: Callable[[Episode], Any], episode: Episode) -> Future[Any]:
    """Run a function in a thread that neither the program's end nor another call ever waits for."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            result = function(episode)
        except BaseException as error:  # whatever it is belongs to the caller
            future.set_exception(error)
        else:
            future.set_result(result)

    future.set_running_or_notify_cancel()
    threading.Thread(target=work, name="whet-reward", daemon=True).start()
    return future


def prompt_in_words(prompt: Prompt) -> str:
    """A prompt's id and the beginning of its text."""
    text = str(prompt.content)
    excerpt = text if len(text) <= EXCERPT_CHARACTERS else f"{text[:EXCERPT_CHARACTERS]}…"
    return f"prompt {prompt.id} ({excerpt!r})"
