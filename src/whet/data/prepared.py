"""Tokenised rows: arrays that may lie on disk, read as units."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from whet.columns import column
from whet.config.data import DataConfig
from whet.data.rows import Source
from whet.data.shapes import Task
from whet.errors import DataError
from whet.types import Sample, Unit


class LabelCounts(NamedTuple):
    """Completions that are desirable or chosen, and those that are undesirable or rejected."""

    desirable: int
    undesirable: int


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the rows; `truncated`, `dropped` and `untrained` count rows, `longest` is before any cut.

    `untrained` rows lost every trained token to truncation, on either side of a pair; they are among the dropped.
    `identical` pairs hold twice the same tokens; they are left out, and not among the dropped. `labels` counts
    the completions that stand alone.
    """

    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    truncated: int
    dropped: int
    untrained: int
    identical: int = 0
    labels: LabelCounts | None = None

    @property
    def truncated_share(self) -> float:
        return self.truncated / self.rows

    @property
    def dropped_share(self) -> float:
        return self.dropped / self.rows

    def __str__(self) -> str:
        counts = self.labels
        labels = f"; {counts.desirable:,} desirable, {counts.undesirable:,} undesirable" if counts else ""
        identical = f"; {self.identical:,} pairs of twice the same left out" if self.identical else ""
        return (
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.trained_tokens:,} of them trained; longest "
            f"{self.longest:,}; truncated {self.truncated:,} ({self.truncated_share:.1%}), "
            f"dropped {self.dropped:,} ({self.dropped_share:.1%}){identical}{labels}"
        )


@dataclass(frozen=True, slots=True)
class Arrays:
    """S samples of U units, end to end, as they lie on disk.

    tokens: [T] int32; mask: [T] bool; sample_ends: [S] int64, the token after each sample; unit_ends: [U]
    int64, the sample after each unit; rows: [U] int64, index of the row over all sources; sources,
    places: [U] int64, the row's source and its number there; cut: [U] bool, truncated.
    prompts: [U] int64, tokens that all samples of a unit begin with as their prompt.
    full_lengths: [R] int64, tokens of the longest sample of every row read, before any cut.
    labels: [S] float32, 1 chosen or desirable, 0 rejected or undesirable; margins: [U] float32. None where
    rows have none. A pair that becomes two units counts as two rows.
    """

    tokens: np.ndarray
    mask: np.ndarray
    sample_ends: np.ndarray
    unit_ends: np.ndarray
    rows: np.ndarray
    sources: np.ndarray
    places: np.ndarray
    cut: np.ndarray
    prompts: np.ndarray
    full_lengths: np.ndarray
    labels: np.ndarray | None = None
    margins: np.ndarray | None = None


@dataclass(frozen=True)
class Prepared:
    """Units in the order of their rows. `prepared[i]` reads one; `lengths` are [U] tokens per unit.

    `selection` [U] holds the indices into the arrays; `fingerprint` identifies tokens, masks, labels and margins.
    `columns` are attached to the tokens, see `with_columns`.
    """

    what: str
    arrays: Arrays
    sources: tuple[Source, ...]
    selection: np.ndarray
    report: Report
    fingerprint: str
    task: Task = "sft"
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.selection)

    def __getitem__(self, i: int) -> Unit:
        """The i-th unit; its id is `what` and the number of its row, as in `train/17`.

        Samples that are judged carry their label in the column `labels`, the chosen of a pair before the rejected;
        a unit with a margin carries it in `margins`.
        """
        unit = int(self.selection[i])
        margins = self.arrays.margins
        return Unit(
            id=f"{self.what}/{self.arrays.rows[unit]}",
            samples=tuple(self._sample(sample) for sample in self._samples(unit)),
            columns={} if margins is None else {"margins": float(margins[unit])},
        )

    def __iter__(self) -> Iterator[Unit]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """[U] int64, tokens per unit, summed over its samples."""
        return np.diff(_bounds(self.arrays), prepend=0)[self.selection]

    @property
    def longest_sample(self) -> int:
        """Tokens of the longest sample, held-out ones of the same files included."""
        return int(np.diff(self.arrays.sample_ends, prepend=0).max())

    @property
    def label_counts(self) -> LabelCounts | None:
        """How many completions are desirable (chosen) and undesirable (rejected); None where rows have no labels."""
        return _count_labels(self.arrays, self.selection)

    def spans(self, i: int) -> tuple[slice, ...]:
        """Where the samples of the i-th unit stand in `arrays.tokens`."""
        return tuple(self._span(sample) for sample in self._samples(int(self.selection[i])))

    def prompt(self, i: int) -> tuple[int, ...]:
        """The tokens of the i-th unit before its first answer."""
        unit = int(self.selection[i])
        return tuple(self._prompt(unit).tolist())

    def with_columns(self, **columns: np.ndarray) -> Prepared:
        """A copy whose samples carry further columns.

        Each is [T] or [T, k] beside `arrays.tokens`, held-out units included, and may lie on disk; a sample
        gets its own stretch of it. The fingerprint stays: what is attached follows from what is there.
        """
        for name, values in columns.items():
            assert column(name).kind == "token", f"column {name!r} is not per token"
            wanted = len(self.arrays.tokens)
            assert len(values) == wanted, f"column {name!r} has {len(values)} entries for {wanted} tokens"
        return replace(self, columns={**self.columns, **columns})

    def origin(self, i: int) -> str:
        """Where the row of the i-th unit stands, as in `train.jsonl:18`."""
        unit = self.selection[i]
        return self.sources[self.arrays.sources[unit]].place(int(self.arrays.places[unit]))

    def share_training_one_of(self, token_ids: Collection[int]) -> float:
        """Share of the units that train at least one of `token_ids`; at 0, a model never learns to stop there."""
        hits = np.isin(self.arrays.tokens, list(token_ids)) & self.arrays.mask
        ends = _bounds(self.arrays)
        per_unit = np.diff(np.concatenate(([0], np.cumsum(hits)))[ends], prepend=0)
        return float((per_unit[self.selection] > 0).mean())

    def hold_out(self, share: float, seed: int) -> tuple[Prepared, Prepared]:
        """Two parts, the second with about `share` of the units.

        A unit's part follows from `seed` and its tokens: rows added elsewhere do not change it, and
        equal rows are never on both sides. Of rows that are judged the prompt alone decides (their tokens where
        there is no prompt), so that no question is on both sides. Raises DataError when either part would be empty.
        """
        held = np.array([held_out(self._deciding(int(unit)), share, seed) for unit in self.selection], dtype=np.bool_)
        require_two_sides(held, share)
        gone = {name: getattr(self.report, name) for name in ("dropped", "untrained", "identical")}
        return self._part(self.what, ~held, **gone), self._part("eval", held)

    def _part(
        self, what: str, chosen: np.ndarray, *, dropped: int = 0, untrained: int = 0, identical: int = 0
    ) -> Prepared:
        selection = self.selection[chosen]
        fingerprint = hashlib.sha256(f"{self.fingerprint} {selection.tolist()}".encode()).hexdigest()
        report = summarise(self.arrays, selection, dropped=dropped, untrained=untrained, identical=identical)
        return replace(self, what=what, selection=selection, report=report, fingerprint=fingerprint)

    def _samples(self, unit: int) -> range:
        first = int(self.arrays.unit_ends[unit - 1]) if unit else 0
        return range(first, int(self.arrays.unit_ends[unit]))

    def _span(self, sample: int) -> slice:
        return slice(int(self.arrays.sample_ends[sample - 1]) if sample else 0, int(self.arrays.sample_ends[sample]))

    def _sample(self, sample: int) -> Sample:
        span, labels = self._span(sample), self.arrays.labels
        columns: dict[str, Any] = {name: values[span] for name, values in self.columns.items()}
        if labels is not None:
            columns["labels"] = float(labels[sample])
        tokens, mask = self.arrays.tokens[span].tolist(), self.arrays.mask[span].tolist()
        return Sample(tokens=tuple(tokens), loss_mask=tuple(mask), columns=columns)

    def _prompt(self, unit: int) -> np.ndarray:
        span = self._span(self._samples(unit).start)
        return self.arrays.tokens[span][: self.arrays.prompts[unit]]

    def _deciding(self, unit: int) -> bytes:
        """What decides on which side of a split a unit is."""
        if self.task != "sft" and self.arrays.prompts[unit] > 0:
            return self._prompt(unit).tobytes()
        return b"".join(self.arrays.tokens[self._span(sample)].tobytes() for sample in self._samples(unit))


def held_out(tokens: bytes, share: float, seed: int) -> bool:
    """Whether a row belongs to the held-out part: by a hash of the seed and its tokens (int32, as bytes)."""
    digest = hashlib.blake2b(tokens, digest_size=8, key=str(seed).encode()[:64]).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def require_two_sides(held: Sequence[bool] | np.ndarray, share: float) -> None:
    """Raise DataError when all rows fell on one side of a split."""
    for side, name in ((True, "evaluation"), (False, "training")):
        if not any(out == side for out in held):
            raise DataError(
                f"data.eval_share is {share}, and of {len(held):,} rows none is left for {name}; "
                f"change it, or name held-out files in data.eval"
            )


def refuse_share(cut: int, rows: int, cfg: DataConfig, *, what: str, remedy: str) -> None:
    """Raise DataError when `cut` of `rows` is more than `data.max_cut_share`; `what` says how they are cut."""
    if cut > cfg.max_cut_share * rows:
        raise DataError(
            f"{cut:,} of {rows:,} rows ({cut / rows:.1%}) {what}; data.max_cut_share allows {cfg.max_cut_share:.1%}; "
            f"{remedy}, or raise data.max_cut_share"
        )


def summarise(
    arrays: Arrays, selection: np.ndarray, *, dropped: int = 0, untrained: int = 0, identical: int = 0
) -> Report:
    """The report on some of the units; the counts of rows that are left out are not in the arrays."""
    alone = len(arrays.sample_ends) == len(arrays.unit_ends)
    trained = np.concatenate(([0], np.cumsum(arrays.mask)))[_bounds(arrays)]
    rows = arrays.rows[selection]
    gone = np.delete(arrays.full_lengths, arrays.rows)
    return Report(
        rows=len(selection) + dropped + identical,
        tokens=int(np.diff(_bounds(arrays), prepend=0)[selection].sum()),
        trained_tokens=int(np.diff(trained, prepend=0)[selection].sum()),
        longest=int(max(arrays.full_lengths[rows].max(initial=0), gone.max(initial=0) if dropped + identical else 0)),
        truncated=int(arrays.cut[selection].sum()),
        dropped=dropped,
        untrained=untrained,
        identical=identical,
        labels=_count_labels(arrays, selection) if alone else None,
    )


def _count_labels(arrays: Arrays, selection: np.ndarray) -> LabelCounts | None:
    if arrays.labels is None:
        return None
    before = np.concatenate(([0], np.cumsum(arrays.labels > 0)))
    ends, starts = arrays.unit_ends[selection], np.concatenate(([0], arrays.unit_ends))[selection]
    desirable = int((before[ends] - before[starts]).sum())
    return LabelCounts(desirable, int((ends - starts).sum()) - desirable)


def _bounds(arrays: Arrays) -> np.ndarray:
    """[U] the token after each unit."""
    return arrays.sample_ends[arrays.unit_ends - 1]
