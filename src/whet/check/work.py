"""How much a run computes at a time: the largest step and micro-batch of its data, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from whet.batch import micro_batches
from whet.check.rehearsal import Micro
from whet.config.rules import REINFORCES
from whet.config.run import RunConfig
from whet.data.prepared import Prepared
from whet.data.prompts import Prompts
from whet.data.source import epoch_order
from whet.schedule import Schedule

SHORT = 256
"""Sequences shorter than this are gathered for attention; longer ones are looked at where they stand."""
STEPS_LOOKED_AT = 64
"""The largest steps of an epoch, whose micro-batches are formed as the run would."""


@dataclass(frozen=True)
class Units:
    """What a step is made of: [U] tokens that the model runs on (shared prefixes once), and [U] trained ones."""

    tokens: np.ndarray
    trained: np.ndarray
    rows: int = 1
    """Rows of each unit, all as long as each other, between which a unit is cut that is larger than a micro-batch;
    1 where a unit is a single row, or its rows stay together."""
    shared: np.ndarray | None = None
    """[U] tokens that rows of a unit share."""

    def cut(self, units: np.ndarray, max_tokens: int) -> Units:
        """These units, the larger ones in parts, as `Batch.refined` cuts them."""
        if self.rows == 1:
            return Units(self.tokens[units], self.trained[units])
        shared = 0 if self.shared is None else self.shared[units]
        whole, each = self.tokens[units], (self.tokens[units] - shared) // self.rows
        most = np.where(whole <= max_tokens, self.rows, np.clip((max_tokens - shared) // each, 1, self.rows))
        parts = -(-self.rows // most)
        first = np.cumsum(parts) - parts
        place = np.arange(parts.sum()) - np.repeat(first, parts)
        rows = np.minimum(np.repeat(most, parts), self.rows - place * np.repeat(most, parts))
        tokens = np.repeat(np.broadcast_to(shared, whole.shape), parts) + rows * np.repeat(each, parts)
        return Units(tokens, rows * np.repeat(self.trained[units] // self.rows, parts))


@dataclass(frozen=True)
class Work:
    """The most that is computed at a time: tokens of a step, a micro-batch, and sequences decoded together."""

    step_tokens: int
    micro: Micro
    decoded: int = 0
    decoded_length: int = 0


def units_of_rows(rows: Prepared, *, shares: bool) -> Units:
    """Sizes of the units of rows, where the samples of a pair share their prompt or do not."""
    arrays, chosen = rows.arrays, rows.selection
    samples = np.diff(arrays.unit_ends, prepend=0)[chosen]
    trained = np.concatenate(([0], np.cumsum(arrays.mask)))[arrays.sample_ends[arrays.unit_ends - 1]]
    shared = (samples - 1) * arrays.prompts[chosen] if shares else 0
    return Units(rows.lengths - shared, np.diff(trained, prepend=0)[chosen])


def units_of_prompts(prompts: Prompts, config: RunConfig, *, shares: bool) -> Units:
    """Sizes of the groups of prompts, all completions as long as they may become."""
    lengths = np.array([len(prompt.tokens) for prompt in prompts.prompts])
    group, longest = config.rollout.group_size, config.rollout.max_tokens
    trained = np.full(len(lengths), group * longest)
    tokens = lengths * (1 if shares else group) + trained
    return Units(tokens, trained, group, lengths if shares else None)


def work_of(units: Units, schedule: Schedule, config: RunConfig, *, decoded_length: int = 0) -> Work:
    """The largest step of the run's first epoch, and its largest micro-batch.

    `decoded_length`: tokens of the longest sequence that is sampled, 0 where nothing is.
    """
    order = epoch_order(len(units.tokens), seed=config.seed, epoch=0, shuffle=config.data.shuffle)
    size = max(1, schedule.units_per_step // schedule.optimizer_steps)
    starts = range(0, len(order), size)[: schedule.total_steps * schedule.optimizer_steps]
    steps = [order[start : start + size] for start in starts]
    totals = [int(units.tokens[step].sum()) for step in steps]
    largest = sorted(range(len(steps)), key=lambda i: -totals[i])[:STEPS_LOOKED_AT]
    micro = max((_largest_micro(units, steps[i], config) for i in largest), key=lambda one: one.tokens)
    group = config.rollout.group_size if config.method in REINFORCES else 1
    most = min(config.engine.max_concurrent, schedule.units_per_step * group)
    return Work(max(totals), micro, most if decoded_length else 0, decoded_length)


def _largest_micro(units: Units, step: Sequence[int] | np.ndarray, config: RunConfig) -> Micro:
    backend = config.backend
    pieces = units.cut(np.asarray(step), backend.max_tokens_per_device)
    sizes = pieces.tokens.tolist()
    cut = micro_batches(sizes, backend.max_tokens_per_device, backend.micro_batch_size)
    largest = max(cut, key=lambda part: sum(sizes[i] for i in part))
    return Micro(
        tokens=int(pieces.tokens[largest].sum()),
        looks=max(1, int(pieces.trained[largest].sum())),
        again=len(cut) > 1,
        gathered=bool(pieces.tokens[largest].mean() < SHORT),
    )
