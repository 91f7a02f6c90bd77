"""Collecting groups: many in flight, each judged as it completes, and no longer sampled than they are needed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from whet.config.rollout import RolloutConfig
from whet.engines.protocol import Engine
from whet.errors import EngineError, RewardError
from whet.rollout.filters import Filter
from whet.rollout.group import Group, GroupPlayer
from whet.rollout.journal import RolloutJournal, number_of
from whet.rollout.supply import Supply

COUNTS = ("num_fetches", "num_left_over", "num_stale")
"""What is counted in every step where groups can be replaced."""
ABORT_GRACE_S = 5.0
"""Most seconds for aborted completions to come back with what they have."""


class Collector:
    """Keeps groups in flight and hands out those that are complete and kept.

    `replaces` says whether a rejected group is replaced by another: without it every group counts, whatever became
    of it. `settled`, `counts` and `rejected` tell what happened since the last `report`.
    """

    def __init__(
        self,
        supply: Supply,
        player: GroupPlayer,
        engine: Engine,
        journal: RolloutJournal,
        rejects: Filter,
        config: RolloutConfig,
        *,
        replaces: bool,
        notes: bool,
    ) -> None:
        self.supply = supply
        self.ready: list[Group] = []
        """Complete and kept, and not yet given out."""
        self.settled: list[Group] = []
        """Complete, kept or not."""
        self.counts: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        """How many groups were rejected, by reason."""
        self._player, self._engine, self._journal, self._rejects = player, engine, journal, rejects
        self._config, self._replaces, self._notes = config, replaces, notes
        self._playing: dict[str, tuple[Group, asyncio.Task[None]]] = {}
        self._capacity = self._step = 0
        self._leaving = False
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._filling = asyncio.Lock()

    async def collect(self, n: int, step: int) -> list[Group]:
        """`n` groups: sampling stops as soon as they are there, and what else is in flight is left over.

        `rollout.oversampling` prompts are asked for at a time, and again whenever those kept and in flight are fewer
        than `n`. Raises RewardError when `rollout.max_fetches` do not suffice, and what the engine raises.
        """
        self._step, fetches = step, 0
        fetch = max(n, self._config.oversampling or 0)
        try:
            while len(self.ready) < n:
                if len(self.ready) + len(self._playing) < n:
                    if fetches == self._config.max_fetches:
                        raise self._exhausted(n, fetches * fetch)
                    self._submit(await self.supply.next(fetch, step))
                    fetches += 1
                    self._count("num_fetches")
                await self._change()
        except BaseException:
            await self.stop()
            self._error = None  # one is told
            raise
        return await self._enough(n)

    async def take_ready(self, n: int, step: int, version: int, capacity: int) -> list[Group]:
        """`n` groups no older than allowed, while up to `capacity` groups stay in flight or ready across steps."""
        self._step, self._capacity = step, capacity
        while True:
            await self.expire(version)  # only a completion tells how old its tokens are
            if len(self.ready) >= n:
                break
            most = self._config.max_fetches * capacity
            if (rejected := sum(self.rejected.values())) >= most:
                raise self._exhausted(n, rejected)
            await self._fill()
            await self._change()
        taken = sorted(self.ready, key=number_of)[:n]
        self.ready = [group for group in self.ready if group not in taken]
        # What is begun now is sampled by the policy as it was before this step's updates: as many groups less may be
        # in flight until the next policy is there, or the last of them would be too old when their step comes.
        self._capacity = capacity - n
        return taken

    async def allow(self, capacity: int) -> None:
        """A new policy samples: keep up to `capacity` groups in flight or ready."""
        self._capacity = capacity
        await self._fill()

    async def expire(self, version: int) -> None:
        """Sample anew, or leave out, every group whose oldest token would be too old for a step at `version`."""
        bound = self._config.staleness
        if bound is None:
            return

        def is_stale(group: Group) -> bool:
            return group.oldest_version is not None and version - group.oldest_version > bound

        stale = [group for group in self.ready if is_stale(group)]
        self.ready = [group for group in self.ready if group not in stale]
        waiting = [group for group in self.supply.left if is_stale(group)]
        self.supply.left = [group for group in self.supply.left if group not in waiting]
        doomed = [(group, task) for group, task in self._playing.values() if is_stale(group)]
        await self._end([task for _, task in doomed])
        for group, _ in doomed:
            self._playing.pop(group.id, None)
        # While the others ended, a doomed one may have been completed: then it was kept, or rejected for good.
        gone = [group for group, _ in doomed if group in self.settled and group not in self.ready]
        for group in [*stale, *waiting, *(group for group, _ in doomed if group not in gone)]:
            self.ready = [other for other in self.ready if other is not group]
            await self._renew(group)

    def report(self) -> tuple[list[Group], dict[str, float]]:
        """The groups that have been completed since the last report, and counts `dropped/<reason>`, `num_fetches`, …"""
        counts: dict[str, float] = dict.fromkeys(COUNTS, 0) if self._replaces else {}
        counts |= {f"dropped/{reason}": count for reason, count in self.rejected.items()} | self.counts
        settled = self.settled
        self.settled, self.counts, self.rejected = [], Counter(), Counter()
        return settled, counts

    async def stop(self) -> None:
        """Cancel what is in flight; the journal knows it as open."""
        self._capacity = 0
        tasks = [task for _, task in self._playing.values()]
        self._playing.clear()
        await self._end(tasks)

    # --- in flight ----------------------------------------------------------------------------------------

    def _submit(self, groups: Sequence[Group]) -> None:
        for group in groups:
            task = asyncio.create_task(self._play(group), name=f"group {group.id}")
            self._playing[group.id] = group, task

    async def _play(self, group: Group) -> None:
        try:
            await self._player.play_group(group, self._journal.note if self._notes else lambda episode: None)
            self._playing.pop(group.id, None)
            if not self._leaving or all(episode.status != "aborted" for episode in group.members):
                self._judge(group)
                await self._player.forget(group)
            if self._capacity:
                await self._fill()
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise  # it was left over, or the run ends
            self._failed(group, EngineError(f"group {group.id} cancelled itself: {error}; look at your own functions"))
        except Exception as error:  # whoever takes groups is told
            self._failed(group, error)
        finally:
            self._changed.set()

    def _failed(self, group: Group, error: Exception) -> None:
        self._playing.pop(group.id, None)
        self._error = self._error or error

    def _judge(self, group: Group) -> None:
        self.settled.append(group)
        reason = self._rejects(group) if self._replaces else None
        if reason is None:
            self._journal.kept(group)
            self.ready.append(group)
        else:
            self._journal.dropped(group, reason)
            self.rejected[reason] += 1

    async def _fill(self) -> None:
        """See to it that as many groups are in flight as there is room for."""
        async with self._filling:
            room = self._capacity - len(self.ready) - len(self._playing)
            if room > 0:
                self._submit(await self.supply.next(room, self._step))

    async def _change(self) -> None:
        """Wait until a group has settled; every wait in playing one has its limit. Raises what it raised."""
        if self._error is None:
            await self._changed.wait()
            self._changed.clear()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    # --- left over ----------------------------------------------------------------------------------------

    async def _enough(self, n: int) -> list[Group]:
        """The first `n` that are ready; everything else waits for another step."""
        left = list(self._playing.values())
        if self._config.partial and left:
            self._leaving = True
            await self._engine.abort({group.id for group, _ in left})
            await asyncio.wait([task for _, task in left], timeout=ABORT_GRACE_S)
            self._leaving = False
        await self.stop()
        if self._error is not None:
            await self._change()
        self.ready.sort(key=number_of)
        taken, spare = self.ready[:n], self.ready[n:]
        unfinished = [group for group, _ in left if group not in self.settled]
        self._count("num_left_over", len(unfinished) + len(spare))
        self.ready = spare if self._config.partial else []
        for group in unfinished if self._config.partial else [*unfinished, *spare]:
            if not self._config.partial:
                group.restart()
            self.supply.give_back(group)
        return taken

    async def _renew(self, group: Group) -> None:
        await self._player.forget(group)
        self.settled = [other for other in self.settled if other is not group]
        self._count("num_stale")
        if self._config.stale == "drop":
            self._journal.dropped(group, "stale")
            return
        group.restart()
        self.supply.give_back(group)

    def _count(self, what: str, number: int = 1) -> None:
        if self._replaces:  # otherwise there is nothing to tell
            self.counts[what] += number

    async def _end(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _exhausted(self, n: int, asked: int) -> RewardError:
        told = ", ".join(f"{count} {reason}" for reason, count in self.rejected.most_common())
        return RewardError(
            f"only {len(self.ready)} of the {n} groups of a step were kept of {asked} prompts; rejected: "
            f"{told or 'none'}. Look at the rewards and at rollout.filter; raise rollout.max_fetches "
            f"({self._config.max_fetches}) if so many rejections are expected"
        )
