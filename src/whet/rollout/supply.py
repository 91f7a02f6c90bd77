"""Groups to be sampled: those that are left over first, then new ones of the next prompts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from whet.config.base import Plugin
from whet.config.plugin import resolve, validated_options
from whet.errors import ConfigError, DataError, WhetError
from whet.rollout.filters import Order
from whet.rollout.group import Group
from whet.rollout.journal import RolloutJournal, name_of, number_of
from whet.rollout.protocols import StateDict
from whet.rollout.threads import heard
from whet.types import Prompt

SOURCE_S = 600.0
"""Most seconds to wait for prompts."""
Begin = Callable[[str, Prompt, int], Group]
"""`(id, prompt, step)`: a group of which nothing is sampled yet."""


class PromptSource(Protocol):
    """Where prompts come from; `data.source.PromptRows` is one."""

    async def take(self, n: int) -> list[Prompt]:
        """The next prompts, at most `n` and at least one."""
        ...

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def resolve_source(plugin: Plugin | None) -> Callable[..., PromptSource]:
    """What makes the run's source of prompts of the shuffled rows. Raises ConfigError for an unknown one."""
    if plugin is None:
        return lambda rows: rows
    made: Any = resolve(plugin.use, {}, what="source of prompts", where="rollout.source.use")
    options = validated_options(made, plugin.options, where="rollout.source")

    def make(rows: PromptSource) -> PromptSource:
        source = made(rows, **options)
        missing = [name for name in ("take", "state_dict", "load_state_dict") if not hasattr(source, name)]
        if missing:
            raise ConfigError(
                f"rollout.source.use is {plugin.use!r}, which has no {' and no '.join(missing)}; a source of prompts "
                "has take(n), state_dict() and load_state_dict(state)"
            )
        if not inspect.iscoroutinefunction(source.take):
            raise ConfigError(f"rollout.source.use is {plugin.use!r}, whose take is not async; write `async def take`")
        return source

    return make


class Supply:
    """Numbers groups in the order of their prompts, so that a group is the same after a resume.

    `order` chooses among the groups that are left over; every new group is in the journal before it is given out.
    """

    def __init__(self, prompts: PromptSource, begin: Begin, order: Order, journal: RolloutJournal) -> None:
        self.prompts, self.begin = prompts, begin
        self.left: list[Group] = []
        self.num_groups = 0
        self._order, self._journal = order, journal

    async def next(self, n: int, step: int) -> list[Group]:
        """`n` groups for `step`; prompts wrap around as often as needed. Raises DataError without prompts."""
        groups = self._order(step, self.left, n) if self.left else []
        prompts: list[Prompt] = []
        while len(groups) + len(prompts) < n:
            window = await self._take(n - len(groups) - len(prompts))
            if not window:
                raise DataError("there is no prompt to sample from; look at data.train and data.max_prompt_length")
            prompts.extend(window)
        numbered = enumerate(prompts, start=self.num_groups)
        new = [self.begin(name_of(number), prompt, step) for number, prompt in numbered]
        if new:
            self.num_groups += len(new)
            self._journal.fetched(new, self.prompts.state_dict())
        return groups + new

    async def _take(self, n: int) -> list[Prompt]:
        """The next prompts. Raises DataError for whatever a source of the user's own does instead."""
        name = f"the source of prompts, {type(self.prompts).__name__}.take({n}),"
        try:
            async with asyncio.timeout(SOURCE_S) as limit:
                window = await heard(self.prompts.take(n))
        except WhetError:
            raise
        except Exception as error:
            if limit.expired():
                raise DataError(f"{name} gave nothing within {SOURCE_S:g} s") from error
            raise DataError(f"{name} raised {type(error).__name__}: {error}") from error
        wrong = [one for one in window or () if not isinstance(one, Prompt)]
        if wrong or len(window or ()) > n:
            told = f"{wrong[0]!r:.80}" if wrong else f"{len(window)} prompts"
            raise DataError(f"{name} gave {told}; expected from 1 to {n} whet.types.Prompt")
        return window

    def give_back(self, group: Group) -> None:
        """Let a group be sampled on, or anew, in the order of the prompts."""
        self._journal.left(group)
        self.left.append(group)
        self.left.sort(key=number_of)
