"""Playing groups: the same prompt several times over, every episode of a group at once, scored as it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from whet.engines.protocol import Engine
from whet.rollout.episode import Play, response_decoder
from whet.rollout.generate import GeneratedPlay, begin
from whet.rollout.protocols import EnvFactory, Scorer
from whet.rollout.seeds import derive_seed
from whet.types import Episode, Prompt, Sampling

Result = TypeVar("Result")

BASELINE_INDEX = -1
"""Of the greedy episode beside a group."""


@dataclass(slots=True, eq=False)
class Group:
    """All episodes of one prompt, in the order of their index, whatever became of them.

    `baseline` is a greedy episode of the same prompt, where credit asks for one; `step` the step of the run in
    which the group was first sampled.
    """

    id: str
    episodes: Sequence[Episode]
    baseline: Episode | None = None
    step: int = 0

    @property
    def members(self) -> list[Episode]:
        """The episodes and the baseline."""
        return [*self.episodes, *([self.baseline] if self.baseline is not None else [])]

    @property
    def prompt(self) -> Prompt:
        return self.episodes[0].prompt

    @property
    def oldest_version(self) -> int | None:
        """The first policy that sampled a token of this group; None before there is one."""
        return min((span.version for episode in self.members for span in episode.versions), default=None)

    def restart(self) -> None:
        """Forget all that was sampled."""
        # What a rollout was split into is not there before it is sampled.
        self.episodes = [one for one in self.episodes if one.rollout in (None, one.index)]
        for episode in self.members:
            episode.restart()


@dataclass(frozen=True, slots=True)
class Rollout:
    """Played and scored groups; seconds until the last token was sampled, and until all was scored."""

    groups: tuple[Group, ...]
    generation_s: float
    total_s: float

    @property
    def episodes(self) -> list[Episode]:
        return [episode for group in self.groups for episode in group.episodes]


class GroupPlayer:
    """Plays groups with one engine, environment, scorer and way of sampling.

    An episode that failed is played again up to `retries` times.
    """

    def __init__(
        self,
        engine: Engine,
        env: EnvFactory,
        scorer: Scorer,
        sampling: Sampling,
        *,
        tokenizer: Any,
        seed: int,
        timeout_s: float,
        retries: int = 0,
    ) -> None:
        self._engine = engine
        self._env = env
        self._scorer = scorer
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._seed = seed
        self._timeout_s = timeout_s
        self._retries = retries
        self._decode = response_decoder(tokenizer, sampling.stop_token_ids)
        self._plays: dict[tuple[str, int], Play | GeneratedPlay] = {}
        self.last_end = 0.0
        """When the last episode ended, by the monotonic clock, its reward aside."""

    def begin(self, name: str, prompt: Prompt, size: int, *, baseline: bool = False, step: int = 0) -> Group:
        """A group of `size` episodes of which nothing is sampled yet."""
        greedy = Episode(prompt, name, BASELINE_INDEX) if baseline else None
        return Group(name, [Episode(prompt, name, index) for index in range(size)], greedy, step)

    async def play(self, prompts: Iterable[tuple[str, Prompt]], size: int) -> Rollout:
        """Play `size` episodes for each pair of a group id and a prompt, all at once, and score them.

        What an episode samples depends on the seed, its group id and its index only.
        Raises EngineError if the engine fails; the other episodes are then cancelled.
        """
        start = self.last_end = time.monotonic()
        groups = tuple(self.begin(name, prompt, size) for name, prompt in prompts)
        try:
            await gather_or_cancel(self.play_group(group) for group in groups)
        finally:
            for group in groups:
                await self.forget(group)
        return Rollout(groups, generation_s=self.last_end - start, total_s=time.monotonic() - start)

    async def play_group(self, group: Group, ended: Callable[[Episode], None] = lambda episode: None) -> None:
        """Play what is missing of a group, and score it; `ended` is told of each episode that has its reward.

        Episodes that are complete stay as they are; those that were aborted go on. Where the engine aborts some, the
        group is left without the judgement of the whole.
        Raises EngineError if the engine fails; the other episodes are then cancelled.
        """
        parts = await gather_or_cancel(self._play_to_the_end(episode, ended) for episode in group.members)
        group.episodes = with_parts(group.episodes, parts)
        if any(episode.status == "aborted" for episode in group.members):
            return
        if group.baseline is not None:
            await self._scorer.score_group([group.baseline])
        await self._scorer.score_group(group.episodes)

    async def forget(self, group: Group) -> None:
        """Let go of the environments of a group; what was sampled in several turns can then not be gone on with."""
        for episode in group.members:
            if (play := self._plays.pop((episode.group, episode.index), None)) is not None:
                await play.close()

    async def _play_to_the_end(self, episode: Episode, ended: Callable[[Episode], None]) -> list[Episode]:
        """Play and score an episode; returns what its rollout was split into besides, scored too."""
        parts: list[Episode] = []
        if episode.reward is not None or episode.status == "failed":
            return parts
        for attempt in range(self._retries + 1):
            if attempt:
                episode.restart()
            if episode.status in ("pending", "aborted"):
                parts = await self._play_one(episode, attempt)
            if episode.status == "aborted":
                return []
            for one in (episode, *parts):
                await self._scorer.score(one)
            if episode.status != "failed":
                break
        if not parts:  # a rollout of several is whole with its group
            ended(episode)
        return parts

    async def _play_one(self, episode: Episode, attempt: int) -> list[Episode]:
        key = (episode.group, episode.index)
        play = self._plays.pop(key, None)
        if play is None or play.episode is not episode or play.closed:
            try:
                play = begin(episode, self._env, self._tokenizer)
            except Exception as error:  # an environment is the user's code: any failure of it costs one episode
                told = f"making the environment raised {type(error).__name__}: {error}"
                episode.status, episode.error = "failed", told
                return []
        greedy = episode.index == BASELINE_INDEX
        sampling = replace(self._sampling, temperature=0.0) if greedy else self._sampling
        seed = derive_seed(self._seed, attempt) if attempt else self._seed
        self._plays[key] = play
        await play.run(self._engine, sampling, seed=seed, decode=self._decode, timeout_s=self._timeout_s)
        if play.closed:
            self._plays.pop(key, None)
        self.last_end = time.monotonic()
        return play.parts if isinstance(play, GeneratedPlay) and not greedy else []


def with_parts(episodes: Sequence[Episode], parts: Sequence[Sequence[Episode]]) -> list[Episode]:
    """The episodes of a group and, after them, the further parts of their rollouts, numbered on."""
    found = [*episodes, *(part for listed in parts for part in listed)]
    for index, part in enumerate(found[len(episodes) :], len(episodes)):
        part.index = index
    return found


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> Sequence[Result]:
    """Run coroutines together; when one raises, cancel the others, wait for their end, and raise it."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
