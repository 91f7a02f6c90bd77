"""When things happen in a run: how many steps there are, after which ones to evaluate and to save."""

from __future__ import annotations

import math
from dataclasses import dataclass

from whet.config.run import RunConfig


@dataclass(frozen=True)
class Schedule:
    """Steps are counted from 1: `evaluates_after(3)` speaks of the moment after the third step."""

    total_steps: int
    steps_per_epoch: int
    units_per_step: int
    optimizer_steps: int
    """Parts of a step's units, each of which is an optimizer step."""
    eval_every: int | None
    save_every: int | None
    eval_at_end: bool
    stop_at: int | None = None
    """Step after which a run ends although its schedule, and its learning rate, go on: there is nothing to train on."""
    ppo_epochs: int = 1
    """Times that a step goes over its units."""

    @property
    def last_step(self) -> int:
        return self.total_steps if self.stop_at is None else min(self.stop_at, self.total_steps)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per step of the loop."""
        return self.optimizer_steps * self.ppo_epochs

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.total_steps * self.updates_per_step

    @property
    def saves(self) -> bool:
        return self.save_every is not None

    def evaluates_after(self, step: int) -> bool:
        return _falls_on(step, self.eval_every) or (self.eval_at_end and step == self.last_step)

    def saves_after(self, step: int) -> bool:
        return _falls_on(step, self.save_every) or (self.saves and step == self.last_step)


def plan(config: RunConfig, num_units: int, *, rollouts: bool) -> Schedule:
    """The schedule of a run over `num_units` rows or prompts.

    The last step of an epoch over rows takes what is left; prompts go round without a seam.
    """
    if rollouts:
        units, optimizer_steps = config.rollout.prompts_per_step, config.rollout.optimizer_steps
        per_epoch = max(1, num_units // units)
    else:
        units, optimizer_steps = config.train.batch_size * config.train.accumulation, 1
        per_epoch = math.ceil(num_units / units)
    return Schedule(
        total_steps=config.train.steps or max(1, math.ceil(config.train.epochs * per_epoch)),
        steps_per_epoch=per_epoch,
        units_per_step=units,
        optimizer_steps=optimizer_steps,
        eval_every=_in_steps(config.eval.every_steps, config.eval.every_epochs, per_epoch),
        save_every=_in_steps(config.checkpoint.every_steps, config.checkpoint.every_epochs, per_epoch),
        eval_at_end=config.eval.at_end,
        ppo_epochs=config.rollout.num_ppo_epochs if rollouts else 1,
    )


def _in_steps(steps: int | None, epochs: int | None, per_epoch: int) -> int | None:
    return steps or (epochs * per_epoch if epochs else None)


def _falls_on(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
