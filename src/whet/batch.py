"""Batch: logical rows that losses see, and the prefix tree that the model runs on.

T tokens in N sequences in U units. All columns are about the logical rows; the tree is only a cheaper
way to compute them. `collate` makes a batch of units, `split` and `micro_batches` cut it between units,
`weights` says how much each value counts.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from whet import tree
from whet.columns import column
from whet.errors import DataError
from whet.tree import Tree
from whet.types import Sample, Unit

WeightKind = Literal["token", "sequence", "fixed_length", "row", "pair"]
Part = Literal["all", "chosen"]
"""Which sequences of a batch something is about: `chosen` are those whose label is 1."""


@dataclass(frozen=True)
class Batch:
    """Sequences laid end to end, grouped into units.

    tokens, position_ids: [T] int64. loss_mask: [T] bool, true on trained tokens, never on the first of a
    sequence. cu_seqlens: [N + 1] int32. unit_ids: [N] int64, ascending from 0; `unit_names` are their
    names over the whole run. `trees` holds one prefix tree per unit.
    """

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    loss_mask: Tensor
    unit_ids: Tensor
    unit_names: tuple[str, ...]
    trees: tuple[Tree, ...]
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def num_units(self) -> int:
        return len(self.unit_names)

    @cached_property
    def lengths(self) -> Tensor:
        """[N] tokens per sequence."""
        return self.cu_seqlens.diff().long()

    @cached_property
    def sequence_ids(self) -> Tensor:
        """[T] the sequence of each token."""
        return torch.repeat_interleave(torch.arange(self.num_sequences, device=self.tokens.device), self.lengths)

    @cached_property
    def tree(self) -> Tree:
        """The prefix trees of all units, side by side."""
        return tree.join(self.trees)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.columns:
            raise KeyError(f"the batch has no column {name!r}; it has {sorted(self.columns) or 'none'}")
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def with_columns(self, **columns: Tensor) -> Batch:
        """This batch with columns added or replaced; each must have the first dimension of its kind."""
        sizes = {"token": self.num_tokens, "sequence": self.num_sequences, "unit": self.num_units}
        for name, values in columns.items():
            kind = column(name).kind
            assert len(values) == sizes[kind], f"column {name!r} is per {kind}: {sizes[kind]} values, not {len(values)}"
        return replace(self, columns={**self.columns, **columns})

    def weighed(self, keys: Iterable[str], *, max_length: int | None = None) -> Batch:
        """This batch with the columns `weights/<key>`, such as `token` or `token/chosen` (see `weight_key`); call it
        on the global batch, before it is cut."""
        return self.with_columns(**{f"weights/{key}": _weights_of(self, key, max_length) for key in keys})

    def sum_tokens(self, values: Tensor) -> Tensor:
        """[T] -> [N] sums over the trained tokens of each sequence."""
        zeros = torch.zeros(self.num_sequences, dtype=values.dtype, device=values.device)
        return zeros.index_add(0, self.sequence_ids, torch.where(self.loss_mask, values, 0))

    def mean_tokens(self, values: Tensor) -> Tensor:
        """[T] -> [N] means over the trained tokens of each sequence; 0 where there is none."""
        return self.sum_tokens(values) / self.num_trained.clamp(min=1)

    @cached_property
    def num_trained(self) -> Tensor:
        """[N] trained tokens per sequence."""
        zeros = torch.zeros(self.num_sequences, dtype=torch.long, device=self.tokens.device)
        return zeros.index_add(0, self.sequence_ids, self.loss_mask.long())

    def select(self, units: Sequence[int]) -> Batch:
        """The batch of these units, in this order."""
        device = self.tokens.device
        by_unit = np.split(np.arange(self.num_sequences), np.flatnonzero(np.diff(self.unit_ids.cpu().numpy())) + 1)
        bounds = self.cu_seqlens.tolist()
        sequences = np.concatenate([by_unit[u] for u in units])
        tokens = np.concatenate([np.arange(bounds[s], bounds[s + 1]) for s in sequences.tolist()])
        pick = {
            "token": torch.from_numpy(tokens).to(device),
            "sequence": torch.from_numpy(sequences).to(device),
            "unit": torch.as_tensor(list(units), device=device),
        }
        lengths = self.lengths[pick["sequence"]]
        counts = [len(by_unit[u]) for u in units]
        return Batch(
            tokens=self.tokens[pick["token"]],
            position_ids=self.position_ids[pick["token"]],
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            loss_mask=self.loss_mask[pick["token"]],
            unit_ids=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device),
            unit_names=tuple(self.unit_names[u] for u in units),
            trees=tuple(self.trees[u] for u in units),
            columns={name: values[pick[column(name).kind]] for name, values in self.columns.items()},
        )

    def split(self, parts: int) -> list[Batch]:
        """Minibatches for `parts` optimizer steps: consecutive units, as even in number as can be."""
        if parts > self.num_units:
            raise DataError(
                f"a batch of {self.num_units} units cannot be split over {parts} optimizer steps; "
                "take more units per step, or fewer optimizer steps"
            )
        return [self.select(units.tolist()) for units in np.array_split(np.arange(self.num_units), parts)]

    def micro_batches(self, max_tokens: int, max_units: int | None = None) -> list[list[int]]:
        """Which units go into which micro-batch: see `micro_batches`."""
        return micro_batches([t.num_tokens for t in self.trees], max_tokens, max_units)

    def refined(self, max_tokens: int) -> Batch:
        """This batch with units of more than `max_tokens` physical tokens cut between their rows, so that each part can
        be a micro-batch; a single row is never cut.

        Tokens, sequences and their columns stay where they are. What is said of a unit is said of each of its parts,
        so this is for losses that give one value per token or sequence, after credit and weights.
        """
        if all(own.num_tokens <= max_tokens for own in self.trees):
            return self
        tokens, starts = self.tokens.cpu().numpy(), self.cu_seqlens.tolist()
        rows = [tokens[start:end] for start, end in pairwise(starts)]
        firsts = np.searchsorted(self.unit_ids.cpu().numpy(), np.arange(self.num_units + 1)).tolist()
        parts = [
            (unit, part)
            for unit, (first, last) in enumerate(pairwise(firsts))
            for part in tree.cut(self.trees[unit], rows[first:last], max_tokens)
        ]
        units = torch.tensor([unit for unit, _ in parts], device=self.tokens.device)
        counts = torch.tensor([count for _, (_, count) in parts], device=self.tokens.device)
        return replace(
            self,
            unit_ids=torch.repeat_interleave(torch.arange(len(parts), device=self.tokens.device), counts),
            unit_names=tuple(self.unit_names[unit] for unit, _ in parts),
            trees=tuple(own for _, (own, _) in parts),
            columns={k: v[units] if column(k).kind == "unit" else v for k, v in self.columns.items()},
        )

    def to(self, device: torch.device | str) -> Batch:
        """This batch with its tensors on another device."""
        names = ("tokens", "position_ids", "cu_seqlens", "loss_mask", "unit_ids")
        move = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **move, columns={k: v.to(device) for k, v in self.columns.items()})


def micro_batches(
    sizes: Sequence[int], max_tokens: int, max_units: int | None = None, *, at_least: int = 0
) -> list[list[int]]:
    """Which units, of these sizes in physical tokens, go into which micro-batch.

    At most `max_tokens` tokens and `max_units` units in each; a unit longer than that stands alone, and comes
    first. Of the others as few as the greedy rule finds, evenly filled, or so many that there are `at_least` as many
    micro-batches (of at least as many units).
    """
    alone = [[unit] for unit, size in enumerate(sizes) if size > max_tokens]
    rest = sorted((u for u, size in enumerate(sizes) if size <= max_tokens), key=lambda u: -sizes[u])
    most = max_units or max(1, len(rest))
    fewest = max(-(-sum(sizes[u] for u in rest) // max_tokens), -(-len(rest) // most), at_least - len(alone))
    attempts = (_fill(rest, sizes, parts, max_tokens, most) for parts in range(fewest, len(rest) + 1))
    return alone + next(bins for bins in attempts if bins is not None)


def _fill(
    units: Sequence[int], sizes: Sequence[int], parts: int, max_tokens: int, max_units: int
) -> list[list[int]] | None:
    """`units`, longest first, each into the emptiest of `parts` bins; None when one does not fit."""
    bins: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, b) for b in range(parts)]
    for unit in units:
        if not loads or loads[0][0] + sizes[unit] > max_tokens:
            return None
        load, target = heapq.heappop(loads)
        bins[target].append(unit)
        if len(bins[target]) < max_units:
            heapq.heappush(loads, (load + sizes[unit], target))
    return [sorted(b) for b in bins]


def collate(units: Sequence[Unit], *, share_prefixes: bool = True) -> Batch:
    """The batch of these units.

    Writes the columns that samples and units carry, each if all of them have it. `share_prefixes` false lays
    every row out in full.
    Raises DataError when only some samples carry a column.
    """
    samples = [sample for unit in units for sample in unit.samples]
    lengths = torch.tensor([len(sample.tokens) for sample in samples])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rows = [np.asarray(sample.tokens, dtype=np.int64) for sample in samples]
    mask = np.concatenate([np.asarray(sample.loss_mask, dtype=bool) for sample in samples])
    mask[starts[:-1].numpy()] = False  # nothing predicts the first token of a sequence
    counts = [len(unit.samples) for unit in units]
    first = np.cumsum([0, *counts]).tolist()
    lay_out = tree.build if share_prefixes else tree.flat
    batch = Batch(
        tokens=torch.from_numpy(np.concatenate(rows)),
        position_ids=torch.from_numpy(np.concatenate([np.arange(len(row)) for row in rows])),
        cu_seqlens=starts.int(),
        loss_mask=torch.from_numpy(mask),
        unit_ids=torch.repeat_interleave(torch.arange(len(units)), torch.tensor(counts)),
        unit_names=tuple(unit.id for unit in units),
        trees=tuple(lay_out(rows[a:b]) for a, b in pairwise(first)),
    )
    return batch.with_columns(**_carried_by_samples(samples), **_carried_by_units(units))


def _carried_by_samples(samples: Sequence[Sample]) -> dict[str, Tensor]:
    carried = [_columns_of(sample) for sample in samples]
    columns: dict[str, Tensor] = {}
    for name in _names(carried, "samples"):
        dtype = getattr(torch, column(name).dtype)
        values = [one[name] for one in carried]
        per_token = column(name).kind == "token"
        flat = np.concatenate([np.asarray(v) for v in values]) if per_token else np.asarray(values)
        columns[name] = torch.as_tensor(flat).to(dtype)
    return columns


def _columns_of(sample: Sample) -> dict[str, Any]:
    own = {"rewards": sample.reward, "sampler_logprobs": sample.sampler_logprobs}
    return {**{name: values for name, values in own.items() if values is not None}, **sample.columns}


def _carried_by_units(units: Sequence[Unit]) -> dict[str, Tensor]:
    names = _names([unit.columns for unit in units], "units")
    return {name: torch.tensor([unit.columns[name] for unit in units], dtype=torch.float32) for name in names}


def _names(carried: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    """The names that all have. Raises DataError for one that only some have."""
    counts = Counter(name for one in carried for name in one)
    for name, count in counts.items():
        if count < len(carried):
            raise DataError(f"{count} of {len(carried)} {what} carry {name}; either all must, or none")
    return list(counts)


def weight_key(kind: WeightKind, on: Part = "all") -> str:
    """What the weights of this kind over this part of the batch are called."""
    return kind if on == "all" else f"{kind}/{on}"


def _weights_of(batch: Batch, key: str, max_length: int | None) -> Tensor:
    kind, _, on = key.partition("/")
    return weights(batch, cast(WeightKind, kind), max_length=max_length, on=cast(Part, on or "all"))


def weights(batch: Batch, kind: WeightKind, *, max_length: int | None = None, on: Part = "all") -> Tensor:
    """How much each value of a loss counts, as a column computed over the whole (global) batch.

    `token` [T]: mean over trained tokens. `sequence` [T]: mean over sequences of the mean over their trained
    tokens; sequences without any weigh nothing. `fixed_length` [T]: 1 / (N * max_length), Dr. GRPO
    (arXiv:2503.20783). `row` [N]: mean over sequences. `pair` [U]: mean over units. All but `fixed_length`
    sum to one, so nothing that runs a part of the batch divides again. `on` leaves all but those sequences out.
    Sequences that share a rollout id are as one: the mean is over all their tokens, and they count once.
    """
    part = torch.ones_like(batch.lengths, dtype=torch.bool) if on == "all" else batch["labels"] == 1
    mask = (batch.loss_mask & part[batch.sequence_ids]).double()
    if kind == "token":
        values = mask / mask.sum().clamp(min=1)
    elif kind == "sequence":
        rollouts = _rollouts(batch)
        trained = _sums(batch.num_trained * part, rollouts)
        values = mask / trained.clamp(min=1)[rollouts][batch.sequence_ids] / (trained > 0).sum().clamp(min=1)
    elif kind == "fixed_length":
        assert max_length, "fixed_length weights need max_length"
        values = mask / ((_sums(part.long(), _rollouts(batch)) > 0).sum() * max_length)
    elif kind == "row":
        sizes = _sums(part.long(), rollouts := _rollouts(batch))
        values = part.double() / sizes.clamp(min=1)[rollouts] / (sizes > 0).sum().clamp(min=1)
    elif kind == "pair":
        values = torch.full((batch.num_units,), 1 / batch.num_units, dtype=torch.float64, device=mask.device)
    else:
        raise AssertionError(f"unknown kind of weights: {kind}")
    return values.float()


def _rollouts(batch: Batch) -> Tensor:
    """[N] the number of each sequence's rollout in this batch; without rollout ids each is its own."""
    if "rollout_ids" not in batch:
        return torch.arange(batch.num_sequences, device=batch.tokens.device)
    pairs = torch.stack([batch.unit_ids, batch["rollout_ids"]])
    return torch.unique(pairs, dim=1, return_inverse=True)[1]


def _sums(values: Tensor, groups: Tensor) -> Tensor:
    """[N] -> [G] sums of the values of each group."""
    zeros = torch.zeros(int(groups.max()) + 1, dtype=values.dtype, device=values.device)
    return zeros.index_add(0, groups, values)
