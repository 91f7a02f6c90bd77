"""The part of a batch that one rank works on, cut so that every rank runs as many micro-batches as the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from whet.batch import Batch, micro_batches
from whet.ranks.balance import balanced


@dataclass(frozen=True)
class Share:
    """Units of a global batch, in micro-batches.

    `micro_batches` holds, for each, the units of `batch` in it. There are as many as on every other rank; an empty one
    is a filler: `filler` is then run in its place, a unit without weight, so that what ranks do together is done by
    all. A rank without any unit has fillers only, and `batch` is then the filler as well.
    """

    batch: Batch
    micro_batches: tuple[tuple[int, ...], ...]
    filler: Batch

    def micros(self) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """Each micro-batch with its units in `batch`; none of a filler."""
        for units in self.micro_batches:
            yield units, self.batch.select(units) if units else self.filler


def shares(
    batch: Batch, parts: int, costs: Sequence[float], max_tokens: int, max_units: int | None = None
) -> list[tuple[list[int], Share]]:
    """For each of `parts` ranks, its units of the batch (none, where there are fewer than ranks) and its share.

    `costs` are what the units take; ranks get sums that are as alike as possible. `max_tokens` and `max_units` bound a
    micro-batch as in `Batch.micro_batches`.
    """
    filler = weightless(batch)
    chosen = balanced(costs, parts)
    sizes = [tree.num_tokens for tree in batch.trees]
    own = [[sizes[unit] for unit in units] for units in chosen]
    needed = max(len(micro_batches(one, max_tokens, max_units)) for one in own)
    found = []
    for units, one in zip(chosen, own, strict=True):
        cut = micro_batches(one, max_tokens, max_units, at_least=min(needed, len(one)))
        padded = (*map(tuple, cut), *((),) * (needed - len(cut)))
        found.append((units, Share(batch.select(units) if units else filler, padded, filler)))
    return found


def weightless(batch: Batch) -> Batch:
    """The shortest unit of a batch, counting for nothing."""
    shortest = min(range(batch.num_units), key=lambda unit: batch.trees[unit].num_tokens)
    unit = batch.select([shortest])
    weights = {name: torch.zeros_like(values) for name, values in unit.columns.items() if name.startswith("weights/")}
    return unit.with_columns(**weights)
