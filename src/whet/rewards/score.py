"""The scorer: calls the reward functions of a run on an episode and makes one number of what they say."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from whet.config.backend import BackendConfig
from whet.errors import DataError, RewardError
from whet.rollout.threads import heard, in_thread
from whet.types import Episode, Prompt

logger = logging.getLogger(__name__)

# More at a time would only take each other's share of the interpreter, and run into their limits.
MAX_THREADS = 16
EXCERPT_CHARACTERS = 80
LARGEST = 1e18
"""Of a reward: the square of a deviation stays within float32."""


@dataclass(frozen=True, slots=True)
class NamedReward:
    """One reward function, the name it is reported under, its weight, and the limit for one call.

    `key` is the part that counts of several; with `group` it is called with the members of a group and gives a list.
    """

    name: str
    reward: Any
    weight: float = 1.0
    timeout_s: float = 60.0
    key: str | None = None
    group: bool = False


Choice = Callable[[Prompt], Sequence[NamedReward]]
"""Which rewards judge the answers to a prompt. Raises ValueError where the prompt asks for one that is not there."""


class RewardScorer:
    """Scores episodes by a weighted sum of rewards. Implements `rollout.protocols.Scorer`.

    `choose` tells which of them judge a prompt's answers; all of them without it. Async rewards run on the event
    loop, all others in threads, at most 16 at a time. A thread that runs into its limit is left behind: it cannot be
    stopped, but nothing waits for it any more. A reward with an attribute `max_concurrent` is called by so many at a
    time; its time counts from then.
    """

    def __init__(self, rewards: Sequence[NamedReward], choose: Choice | None = None) -> None:
        assert len({reward.name for reward in rewards}) == len(rewards) > 0, "rewards have names of their own"
        self.rewards = tuple(rewards)
        self._choose: Choice = choose or (lambda prompt: self.rewards)
        self._seen = {reward.name: reward for reward in self.rewards}
        self._num_uniform = 0
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Ask the rewards whether they can judge these prompts at all, before a model is loaded.

        Raises DataError with the first prompt that one of them cannot judge, and how many there are.
        """
        faults: dict[str, list[str]] = {}
        for prompt in prompts:
            for who, fault in self._faults(prompt):
                faults.setdefault(who, []).append(fault)
        if faults:
            raise DataError(
                "\n".join(
                    f"{who} cannot judge {len(found)} prompts; the first is {found[0]}; correct the rows, or name the "
                    "column that holds the answer in data.columns, as in {label: answer}"
                    for who, found in faults.items()
                )
            )

    def load(self, backend: BackendConfig) -> None:
        """Let rewards that have a method `load` load their models as the run loads its own."""
        for named in self._seen.values():
            if (load := getattr(named.reward, "load", None)) is not None:
                load(backend)

    async def score(self, episode: Episode) -> None:
        """Set `reward` to the weighted sum, and `rewards` to each function's own value by its name.

        The parts of a dict are recorded as `name/part`. If any function fails, the episode is marked as failed with
        the reason in `error`. Aborted and failed episodes are left as they are, and so is a reward that is there
        already: an environment's word is final. Where a reward judges whole groups, the sum is made by `score_group`.
        """
        if episode.status in ("aborted", "failed"):
            return
        if episode.reward is not None:
            if not math.isfinite(episode.reward):
                fail(episode, f"its environment set the reward {episode.reward}, which is none")
            return
        try:
            rewards = self._chosen(episode.prompt)
        except ValueError as error:  # told before the start of the prompts that were known then
            fail(episode, str(error))
            return
        outcomes = await asyncio.gather(*(self._outcome(reward, episode) for reward in rewards if not reward.group))
        failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if failures:
            fail(episode, "; ".join(failures))
            return
        episode.rewards = {name: value for outcome in outcomes for name, value in outcome.items()}
        if not any(reward.group for reward in rewards):
            episode.reward = total(rewards, episode)

    async def score_group(self, episodes: Sequence[Episode]) -> None:
        """Add what the rewards over whole groups say, once every member of a group has been through `score`.

        They see the members that were not aborted, have not failed, and have no reward of their own. If one of them
        fails, so do all these members.
        """
        members = [one for one in episodes if one.reward is None and one.status not in ("aborted", "failed")]
        rewards = self._chosen(members[0].prompt) if members else ()
        for reward in (reward for reward in rewards if reward.group):
            outcome = await self._group_outcome(reward, members)
            if isinstance(outcome, str):
                for member in members:
                    fail(member, outcome)
                return
            for member, values in zip(members, outcome, strict=True):
                member.rewards |= values
        for member in members:
            member.reward = total(rewards, member)

    def report_failures(self, episodes: Sequence[Episode]) -> None:
        """Say how many episodes failed, and the first cause with its prompt; let rewards say what they have to say.

        Raises RewardError with that cause if every episode that was not aborted failed.
        """
        self._let_rewards_report(episodes)
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
        return ", ".join(f"reward '{name}'" for name in self._seen)

    def _let_rewards_report(self, episodes: Sequence[Episode]) -> None:
        scored = [episode for episode in episodes if episode.reward is not None]
        for named in self._seen.values():
            if (report := getattr(named.reward, "report", None)) is not None:
                report([episode for episode in scored if named.name in episode.rewards])

    def _chosen(self, prompt: Prompt) -> Sequence[NamedReward]:
        rewards = self._choose(prompt)
        self._seen.update((reward.name, reward) for reward in rewards)
        return rewards

    def _faults(self, prompt: Prompt) -> Iterator[tuple[str, str]]:
        """Who cannot judge a prompt, and why."""
        try:
            rewards = self._chosen(prompt)
        except ValueError as error:
            yield "the rewards", f"{prompt_in_words(prompt)}: {error}"
            return
        for named in rewards:
            check = getattr(named.reward, "check", None)
            if check is not None and (fault := fault_of(check, prompt)) is not None:
                yield f"reward '{named.name}'", fault

    async def _outcome(self, reward: NamedReward, episode: Episode) -> dict[str, float] | str:
        """What one function says of an episode, by name, or why it failed."""
        try:
            return named_numbers(reward.name, await self._call(reward, episode), reward.key)
        except _Failure as failure:
            return f"reward '{reward.name}' {failure}"
        except Exception as error:  # rewards are the user's code: a failure costs one episode, not the run
            return f"reward '{reward.name}' raised {type(error).__name__}: {error}"

    async def _group_outcome(self, reward: NamedReward, members: Sequence[Episode]) -> list[dict[str, float]] | str:
        """What one function says of each member of a group, or why it failed."""
        try:
            values = await self._call(reward, list(members))
            if isinstance(values, str | Mapping) or not hasattr(values, "__len__") or len(values) != len(members):
                raise _Failure(
                    f"returned {values!r:.80}, expected a list of {len(members)} rewards, one for each member"
                )
            return [named_numbers(reward.name, value, reward.key) for value in values]
        except _Failure as failure:
            return f"reward '{reward.name}' {failure}"
        except Exception as error:  # as above; here it costs the group
            return f"reward '{reward.name}' raised {type(error).__name__}: {error}"

    async def _call(self, reward: NamedReward, judged: Episode | list[Episode]) -> Any:
        if is_async(reward.reward):
            limit = getattr(reward.reward, "max_concurrent", None)
            async with self._slot(reward.name, limit) if limit else nullcontext():
                return await within(reward.timeout_s, reward.reward(judged))
        async with self._slot("", MAX_THREADS):
            value = await within(reward.timeout_s, asyncio.wrap_future(in_thread(reward.reward, judged)))
        return await within(reward.timeout_s, value) if inspect.isawaitable(value) else value

    def _slot(self, kind: str, limit: int) -> asyncio.Semaphore:
        """What lets `limit` callers of a kind in at a time; made anew for each event loop."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._slots, self._loop = {}, loop
        return self._slots.setdefault(kind, asyncio.Semaphore(limit))


class _Failure(Exception):
    """A reward function that took too long, or gave what is no reward; the message says which."""


def named_numbers(name: str, value: Any, key: str | None = None) -> dict[str, float]:
    """What a reward function returned, as numbers: its value under `name`, parts of a dict as `name/part`.

    A dict's value is the part called `key`, where that is given, else its `score`, or the sum of its parts. Text
    beside the part that counts is left out, and with a `key` whatever else is no number.
    """
    if not isinstance(value, Mapping):
        if key is not None:
            raise _Failure(f"returned {value!r:.80}, expected a dict that holds its key {key!r}")
        return {name: number(value)}
    if not value or (key is not None and key not in value):
        raise _Failure(f"returned a dict without {key!r}: {dict(value)!r:.80}" if value else "returned an empty dict")
    counts = key if key is not None else "score" if "score" in value else None
    parts = {}
    for part, content in value.items():
        beside = counts is not None and part != counts
        if not beside or not (isinstance(content, str) or (key is not None and not hasattr(content, "__float__"))):
            parts[str(part)] = number(content)
    value_of_all = parts[str(counts)] if counts is not None else sum(parts.values())
    return {name: value_of_all, **{f"{name}/{part}": content for part, content in parts.items()}}


def total(rewards: Sequence[NamedReward], episode: Episode) -> float:
    """The weighted sum of what rewards have said of an episode."""
    return sum(reward.weight * episode.rewards[reward.name] for reward in rewards)


def fail(episode: Episode, why: str) -> None:
    """Mark an episode as failed; it keeps no number."""
    episode.status, episode.error, episode.reward, episode.rewards = "failed", why, None, {}


def number(value: Any) -> float:
    """A finite float. Numbers of numpy and torch will do; text will not."""
    if not hasattr(value, "__float__"):
        raise _Failure(f"returned {value!r:.80}, expected a number or a dict of numbers")
    result = float(value)
    if not math.isfinite(result):
        raise _Failure(f"returned {result}, which is no reward")
    if abs(result) > LARGEST:
        raise _Failure(f"returned {result:g}, which is too large to compute with in float32")
    return result


def is_async(reward: Any) -> bool:
    """Whether calling a reward gives a coroutine: an async function, or an object with an async `__call__`."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004


async def within(timeout_s: float, awaitable: Awaitable[Any]) -> Any:
    """The result of an awaitable, under a limit."""
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await heard(awaitable)
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


def prompt_in_words(prompt: Prompt) -> str:
    """A prompt's id and the beginning of its text."""
    text = str(prompt.content)
    excerpt = text if len(text) <= EXCERPT_CHARACTERS else f"{text[:EXCERPT_CHARACTERS]}…"
    return f"prompt {prompt.id} ({excerpt!r})"
