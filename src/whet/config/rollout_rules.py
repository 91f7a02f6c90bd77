"""Rules between the settings of a rollout: what does not go together, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from whet.config.names import show
from whet.config.problems import Problem
from whet.config.rollout import RolloutConfig

TRAINING_ALONE = (
    *("num_ppo_epochs", "mode", "max_staleness", "stale", "oversampling", "filter", "max_fetches", "partial"),
    *("old_logprobs", "mask_offpolicy", "buffer", "sample_filter", "source"),
)
"""Settings of sampling that only reinforcement learning has a use for."""


def rollout_problems(rollout: RolloutConfig, *, has_env: bool) -> Iterator[Problem]:
    """Everything in the settings of a rollout that does not go together, in reinforcement learning."""
    yield from _schedule(rollout)
    yield from _selection(rollout)
    yield from _leftovers(rollout)
    if rollout.generate is not None and has_env:
        yield _problem(
            "generate", rollout, "but env is given as well, and only one of them can play an episode; remove one"
        )


def idle_problems(rollout: RolloutConfig, method: str) -> Iterator[Problem]:
    """Settings that a method which does not reinforce would ignore."""
    for name in TRAINING_ALONE:
        if _is_given(rollout, name):
            yield _problem(name, rollout, f"but {method} has no use for it; remove it")


def _schedule(rollout: RolloutConfig) -> Iterator[Problem]:
    updates = rollout.updates_per_step
    if rollout.max_staleness is not None:
        if rollout.mode == "one_step_off":
            yield _problem(
                "max_staleness",
                rollout,
                f"but in mode one_step_off completions are always one step ({updates} optimizer steps) old; remove it, "
                "or use rollout.mode async",
            )
        elif rollout.mode == "sync" and not rollout.partial:
            yield _problem(
                "max_staleness",
                rollout,
                "but in mode sync nothing is ever stale unless rollout.partial keeps what is left over; remove it, or "
                "use rollout.mode async",
            )
        elif rollout.mode == "async" and rollout.max_staleness < updates:
            yield _problem(
                "max_staleness",
                rollout,
                f"but in mode async what is sampled while a step trains is {updates} optimizer steps old when the next "
                f"takes it (rollout.optimizer_steps {rollout.optimizer_steps} x rollout.num_ppo_epochs "
                f"{rollout.num_ppo_epochs}); give at least {updates}, or use rollout.mode sync",
            )
    if _is_given(rollout, "stale") and not _grows_stale(rollout):
        yield _problem("stale", rollout, "but nothing can grow too old here; remove it")


def _selection(rollout: RolloutConfig) -> Iterator[Problem]:
    if rollout.oversampling is not None:
        if rollout.oversampling < rollout.prompts_per_step:
            yield _problem(
                "oversampling",
                rollout,
                f"but a step needs {rollout.prompts_per_step} groups (rollout.prompts_per_step); raise it to at least "
                "that",
            )
        if rollout.mode == "async":
            yield _problem("oversampling", rollout, "but in mode async sampling goes on across steps anyway; remove it")
    if _is_given(rollout, "max_fetches") and rollout.filter is None and rollout.oversampling is None:
        yield _problem("max_fetches", rollout, "but without rollout.filter no group is rejected; remove it")


def _leftovers(rollout: RolloutConfig) -> Iterator[Problem]:
    aborts = rollout.mode != "async" and (rollout.filter is not None or _oversamples(rollout))
    if rollout.partial and rollout.mode == "async":
        yield _problem(
            "partial", rollout, "but in mode async completions go on across steps without being aborted; remove it"
        )
    elif rollout.partial and not aborts:
        yield _problem(
            "partial",
            rollout,
            f"but nothing is ever aborted: every step waits for its {rollout.prompts_per_step} groups; give "
            "rollout.oversampling more prompts than rollout.prompts_per_step",
        )
    if rollout.mask_offpolicy and not rollout.partial:
        yield _problem(
            "mask_offpolicy", rollout, "but without rollout.partial no completion goes on in a later step; remove it"
        )
    if rollout.buffer is not None and not aborts:
        yield _problem("buffer", rollout, "but no group is ever left over without rollout.oversampling; remove it")


def _oversamples(rollout: RolloutConfig) -> bool:
    return rollout.oversampling is not None and rollout.oversampling > rollout.prompts_per_step


def _grows_stale(rollout: RolloutConfig) -> bool:
    return rollout.mode == "async" or (rollout.partial and rollout.max_staleness is not None)


def _is_given(rollout: RolloutConfig, name: str) -> bool:
    return getattr(rollout, name) != RolloutConfig.model_fields[name].default


def _problem(name: str, rollout: RolloutConfig, text: str) -> Problem:
    value: Any = getattr(rollout, name)
    shown = show(value.use) if hasattr(value, "use") else show(value)
    return Problem(("rollout", name), f"rollout.{name} is {shown}, {text}")
