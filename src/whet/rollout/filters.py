"""Which groups are trained on, which samples of them, and in which order left-over groups go on.

The functions are called as slime calls its own: with the settings of the run, and with samples.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from whet.config.base import Config, Plugin
from whet.config.plugin import options_of, resolve, validated_options
from whet.config.rollout import RolloutConfig
from whet.errors import ConfigError, RewardError
from whet.rollout.group import Group
from whet.rollout.slime import SlimeArgs, SlimeSample

logger = logging.getLogger(__name__)

FAILED = "failed"
"""Why a group without any reward is rejected."""

Filter = Callable[[Group], str | None]
"""Why a complete group is rejected, None if it is kept."""
Order = Callable[[int, list[Group], int], list[Group]]
"""`(step, groups, n)`: which of the left-over groups go on now, at most `n`; they are taken out of the list."""
SampleFilter = Callable[[Sequence[Group]], set[tuple[str, int]]]
"""The samples, as (group id, place in the group), that are not to be trained."""


@dataclass(frozen=True)
class Choices:
    """The three of a run."""

    rejects: Filter
    order: Order
    remove: SampleFilter


def build_choices(rollout: RolloutConfig, run: Config | None = None) -> Choices:
    """What chooses in this run. `run` is what users' functions see as the settings. Raises ConfigError."""
    return Choices(
        _build_filter(rollout.filter, run),
        _build_order(rollout.buffer, run),
        _build_sample_filter(rollout.sample_filter, run),
    )


class Verdict(NamedTuple):
    """What a filter says of a group, and why it rejects it."""

    keep: bool
    reason: str


def nonzero_std(args: Any, samples: Sequence[SlimeSample], **options: Any) -> Verdict:
    """Keeps groups whose rewards differ, so that there is something to learn from. Source: DAPO, arXiv:2503.14476."""
    return Verdict(len({sample.reward for sample in samples}) > 1, "zero_std")


def pop_first(args: Any, rollout_id: int, buffer: list[list[SlimeSample]], num_samples: int) -> list[list[SlimeSample]]:
    """The groups that have waited longest."""
    popped = buffer[:num_samples]
    del buffer[:num_samples]
    return popped


FILTERS: dict[str, Any] = {"nonzero_std": nonzero_std}
ORDERS: dict[str, Any] = {"pop_first": pop_first}


def _build_filter(plugin: Plugin | None, run: Config | None) -> Filter:
    """What rejects complete groups: those without any reward, and those that the function says no to.

    The function is called with the scored samples; it returns a truth value, or an object with `keep` and `reason`.
    Raises ConfigError for an unknown one.
    """
    if plugin is None:
        return lambda group: None if any(one.reward is not None for one in group.episodes) else FAILED
    function, args = _function(plugin, FILTERS, "filter", run)
    name = f"rollout.filter {plugin.use!r}"

    def verdict(samples: list[SlimeSample]) -> tuple[bool, Any]:
        answer = function(args, samples)
        return bool(getattr(answer, "keep", answer)), getattr(answer, "reason", None)

    def judge(group: Group) -> str | None:
        samples = [SlimeSample.of(episode) for episode in group.episodes if episode.reward is not None]
        if not samples:
            return FAILED
        kept, reason = _called(name, f"group {group.id}", verdict, samples)
        return None if kept else _word(reason or plugin.use)

    return judge


def _build_order(plugin: Plugin | None, run: Config | None) -> Order:
    """What chooses among left-over groups. Raises ConfigError for an unknown one."""
    function, args = _function(plugin or Plugin(use="pop_first"), ORDERS, "buffer", run)
    name = f"rollout.buffer {plugin.use if plugin else 'pop_first'!r}"

    def pick(step: int, buffer: list[list[SlimeSample]], n: int, known: Mapping[str, Group]) -> list[Group]:
        return [known[samples[0].group_index] for samples in function(args, step, buffer, n) or []]

    def choose(step: int, groups: list[Group], n: int) -> list[Group]:
        buffer = [[SlimeSample.of(episode) for episode in group.episodes] for group in groups]
        known = {group.id: group for group in groups}
        chosen = _called(name, f"{len(buffer)} groups", pick, step, buffer, n, known)
        if len(chosen) > n or len({group.id for group in chosen}) < len(chosen):
            raise RewardError(f"{name} chose {len(chosen)} groups, some twice or more than the {n} it was asked for")
        left = {samples[0].group_index for samples in buffer} - {group.id for group in chosen}
        groups[:] = [group for group in groups if group.id in left]
        if lost := known.keys() - left - {group.id for group in chosen}:
            # A buffer may forget what is too old; that must not go unseen.
            logger.warning("%s left out %d groups for good: %s", name, len(lost), ", ".join(sorted(lost)[:8]))
        return chosen

    return choose


def _build_sample_filter(plugin: Plugin | None, run: Config | None) -> SampleFilter:
    """What marks samples that are not to be trained. Raises ConfigError for an unknown one."""
    if plugin is None:
        return lambda groups: set()
    function, args = _function(plugin, {}, "sample filter", run, "sample_filter")

    def mark(groups: Sequence[Group]) -> set[tuple[str, int]]:
        samples = [[SlimeSample.of(episode) for episode in group.episodes] for group in groups]
        _called(f"rollout.sample_filter {plugin.use!r}", f"{len(samples)} groups", function, args, samples)
        return {
            (group.id, place)
            for group, members in zip(groups, samples, strict=True)
            for place, sample in enumerate(members)
            if sample.remove_sample
        }

    return mark


def _function(
    plugin: Plugin, builtins: dict[str, Any], what: str, run: Config | None, field: str | None = None
) -> tuple[Callable[..., Any], SlimeArgs]:
    where = f"rollout.{field or what}"
    function: Any = resolve(plugin.use, builtins, what=what, where=f"{where}.use")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"{where}.use is {plugin.use!r}, which is async; expected a plain function")
    own = options_of(function).model_fields
    options = validated_options(function, {k: v for k, v in plugin.options.items() if k in own}, where=where)
    args = SlimeArgs(run, {k: v for k, v in plugin.options.items() if k not in own})
    return (partial(function, **options) if options else function), args


def _called(name: str, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # it is the user's code
        raise RewardError(f"{name} raised {type(error).__name__} on {what}: {error}") from error


def _word(reason: Any) -> str:
    """A reason as part of the name of a metric."""
    return re.sub(r"[^\w.-]+", "_", str(reason).rpartition(":")[2])[:60]
