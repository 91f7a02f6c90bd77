"""Playing groups: the same prompt several times over, every episode of a step at once, scored as it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from whet.engines.protocol import Engine
from whet.rollout.episode import play_episode, response_decoder
from whet.rollout.protocols import EnvFactory, Scorer
from whet.types import Episode, Prompt, Sampling

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Group:
    """All episodes of one prompt, in the order of their index, whatever became of them."""

    id: str
    episodes: tuple[Episode, ...]


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
    """Plays groups with one engine, environment, scorer and way of sampling."""

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
    ) -> None:
        self._engine = engine
        self._env = env
        self._scorer = scorer
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._seed = seed
        self._timeout_s = timeout_s
        self._decode = response_decoder(tokenizer, sampling.stop_token_ids)

    async def play(self, prompts: Iterable[tuple[str, Prompt]], size: int) -> Rollout:
        """Play `size` episodes for each pair of a group id and a prompt, all at once, and score them.

        What an episode samples depends on the seed, its group id and its index only.
        Raises EngineError if the engine fails; the other episodes are then cancelled.
        """
        start = time.monotonic()
        ends: list[float] = []
        episodes = [Episode(prompt, group, index) for group, prompt in prompts for index in range(size)]
        groups = [episodes[first : first + size] for first in range(0, len(episodes), size)]
        await gather_or_cancel(self._play_group(members, ends) for members in groups)
        return Rollout(
            tuple(Group(members[0].group, tuple(members)) for members in groups),
            generation_s=max(ends, default=start) - start,
            total_s=time.monotonic() - start,
        )

    async def _play_group(self, members: Sequence[Episode], ends: list[float]) -> None:
        await gather_or_cancel(self._play_one(episode, ends) for episode in members)
        await self._scorer.score_group(members)

    async def _play_one(self, episode: Episode, ends: list[float]) -> None:
        try:
            env = self._env(episode.prompt, self._tokenizer)
        except Exception as error:  # an environment is the user's code: any failure of it costs one episode
            episode.status, episode.error = "failed", f"making the environment raised {type(error).__name__}: {error}"
            return
        await play_episode(
            episode,
            env,
            self._engine,
            self._sampling,
            seed=self._seed,
            decode=self._decode,
            timeout_s=self._timeout_s,
        )
        ends.append(time.monotonic())
        await self._scorer.score(episode)


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> Sequence[Result]:
    """Run coroutines together; when one raises, cancel the others, wait for their end, and raise it."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
