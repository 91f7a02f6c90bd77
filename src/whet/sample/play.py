"""Playing the prompts of a sampling run: a step at a time, each group judged and written down when it is done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

from whet.errors import EngineError
from whet.log import Meter
from whet.rollout.group import Group, GroupPlayer
from whet.rollout.protocols import Scorer
from whet.sample.journal import Completed, Journal
from whet.types import Episode, Prompt


class Unscored:
    """Leaves episodes as they are: a group is scored when all of it is there."""

    async def score(self, episode: Episode) -> None: ...

    async def score_group(self, episodes: Sequence[Episode]) -> None: ...


class StepPlayer:
    """Plays what is missing in a journal, `per_step` prompts at a time.

    All completions of a step are asked for at once, and a step that was interrupted is played again as a whole:
    so the engine decodes the same rows together, and gives the same bits, however often a run is killed. Groups
    that are in the journal already are not judged again. While one step is judged, the next is being sampled.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        player: GroupPlayer,
        scorer: Scorer,
        journal: Journal,
        *,
        group_size: int,
        per_step: int,
        meter: Meter | None,
    ) -> None:
        self._prompts, self._player, self._scorer, self._journal = prompts, player, scorer, journal
        self._size, self._per_step, self._meter = group_size, per_step, meter
        self._start = time.monotonic()
        self._tokens, self._scores = 0, [0.0, 0.0]

    async def play(self) -> None:
        """Play to the end. Whatever ends it before, what is in the journal is whole.

        Raises EngineError when the engine fails, RewardError when all completions of a step failed: then the
        fault is not with one of them, and none of that step's failures are written down.
        """
        tasks: list[asyncio.Task] = []
        judging: asyncio.Task[None] | None = None
        try:
            for step in self._steps():
                playing = {position: asyncio.create_task(self._play(position)) for position in step}
                tasks = [*playing.values(), *([judging] if judging else [])]
                next_judging = asyncio.create_task(self._judge(playing))
                tasks.append(next_judging)
                await asyncio.gather(*playing.values())
                if judging is not None:
                    await judging
                judging = next_judging
            if judging is not None:
                await judging
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _steps(self) -> Iterator[range]:
        """Positions of the prompts of each step of which something is missing."""
        for first in range(0, len(self._prompts), self._per_step):
            step = range(first, min(first + self._per_step, len(self._prompts)))
            if any(position not in self._journal for position in step):
                yield step

    async def _play(self, position: int) -> Group:
        rollout = await self._player.play([(group_name(position), self._prompts[position])], self._size)
        (group,) = rollout.groups
        if any(episode.status == "aborted" for episode in group.episodes):
            raise EngineError(f"the engine aborted completions of group {group.id}; the same command samples it anew")
        self._tokens += sum(episode.num_sampled for episode in group.episodes)
        return group

    async def _judge(self, playing: dict[int, asyncio.Task[Group]]) -> None:
        """Score the groups of a step as they come, and write them down."""
        known = sum(self._journal.num_scored(position) for position in playing)
        missing = [position for position in playing if position not in self._journal]
        groups = await asyncio.gather(*(self._score(position, playing[position]) for position in missing))
        episodes = [episode for group in groups for episode in group.episodes]
        if not known:
            self._scorer.report_failures(episodes)
        for position, group in zip(missing, groups, strict=True):
            if position not in self._journal:
                self._write(position, group)

    async def _score(self, position: int, playing: asyncio.Task[Group]) -> Group:
        group = await asyncio.shield(playing)
        await asyncio.gather(*(self._scorer.score(episode) for episode in group.episodes))
        await self._scorer.score_group(group.episodes)
        if any(episode.reward is not None for episode in group.episodes):
            self._write(position, group)
        return group

    def _write(self, position: int, group: Group) -> None:
        self._journal.write(position, self._prompts[position].id, [Completed.of(one) for one in group.episodes])
        scores = [episode.reward for episode in group.episodes if episode.reward is not None]
        self._scores[0] += sum(scores)
        self._scores[1] += len(scores)
        if self._meter is not None:
            speed = self._tokens / max(1e-9, time.monotonic() - self._start)
            mean = self._scores[0] / max(1.0, self._scores[1])
            self._meter.show(len(self._journal), {"reward": mean, "tokens_per_s": speed})


def group_name(position: int) -> str:
    """The id of the group of a prompt; seeds follow from it, so it is the same in every run over the same file."""
    return f"g{position}"
