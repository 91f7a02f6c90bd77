"""Tokenised rows: arrays that may lie on disk, read as units."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from whet.config.data import DataConfig
from whet.data.rows import Source
from whet.errors import DataError
from whet.types import Sample, Unit


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the rows; `truncated`, `dropped` and `untrained` count rows, `longest` is before any cut.

    `untrained` rows lost every trained token to truncation; they are among the dropped.
    """

    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    truncated: int
    dropped: int
    untrained: int

    @property
    def truncated_share(self) -> float:
        return self.truncated / self.rows

    @property
    def dropped_share(self) -> float:
        return self.dropped / self.rows

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.trained_tokens:,} of them trained; longest "
            f"{self.longest:,}; truncated {self.truncated:,} ({self.truncated_share:.1%}), "
            f"dropped {self.dropped:,} ({self.dropped_share:.1%})"
        )


@dataclass(frozen=True, slots=True)
class Arrays:
    """S samples of U units, end to end, as they lie on disk.

    tokens: [T] int32; mask: [T] bool; sample_ends: [S] int64, the token after each sample; unit_ends: [U]
    int64, the sample after each unit; rows: [U] int64, index of the row over all sources; sources,
    places: [U] int64, the row's source and its number there; cut: [U] bool, truncated.
    full_lengths: [R] int64, tokens of the longest sample of every row read, before any cut.
    """

    tokens: np.ndarray
    mask: np.ndarray
    sample_ends: np.ndarray
    unit_ends: np.ndarray
    rows: np.ndarray
    sources: np.ndarray
    places: np.ndarray
    cut: np.ndarray
    full_lengths: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """Units in the order of their rows. `prepared[i]` reads one; `lengths` are [U] tokens per unit.

    `selection` [U] holds the indices into the arrays; `fingerprint` identifies tokens and masks.
    """

    what: str
    arrays: Arrays
    sources: tuple[Source, ...]
    selection: np.ndarray
    report: Report
    fingerprint: str

    def __len__(self) -> int:
        return len(self.selection)

    def __getitem__(self, i: int) -> Unit:
        """The i-th unit; its id is `what` and the number of its row, as in `train/17`."""
        unit = int(self.selection[i])
        return Unit(
            id=f"{self.what}/{self.arrays.rows[unit]}",
            samples=tuple(
                Sample(
                    tokens=tuple(self.arrays.tokens[where].tolist()), loss_mask=tuple(self.arrays.mask[where].tolist())
                )
                for where in self._samples(unit)
            ),
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
        equal rows are never on both sides. Raises DataError when either part would be empty.
        """
        held = np.array(
            [held_out(self._token_bytes(int(unit)), share, seed) for unit in self.selection], dtype=np.bool_
        )
        require_two_sides(held, share)
        return self._part(self.what, ~held, self.report.dropped, self.report.untrained), self._part("eval", held, 0, 0)

    def _part(self, what: str, chosen: np.ndarray, dropped: int, untrained: int) -> Prepared:
        selection = self.selection[chosen]
        fingerprint = hashlib.sha256(f"{self.fingerprint} {selection.tolist()}".encode()).hexdigest()
        report = summarise(self.arrays, selection, dropped=dropped, untrained=untrained)
        return replace(self, what=what, selection=selection, report=report, fingerprint=fingerprint)

    def _samples(self, unit: int) -> Iterator[slice]:
        first = int(self.arrays.unit_ends[unit - 1]) if unit else 0
        for sample in range(first, int(self.arrays.unit_ends[unit])):
            yield slice(int(self.arrays.sample_ends[sample - 1]) if sample else 0, int(self.arrays.sample_ends[sample]))

    def _token_bytes(self, unit: int) -> bytes:
        return b"".join(self.arrays.tokens[where].tobytes() for where in self._samples(unit))


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


def summarise(arrays: Arrays, selection: np.ndarray, *, dropped: int, untrained: int) -> Report:
    """The report on some of the units; the counts of dropped rows are not in the arrays."""
    trained = np.concatenate(([0], np.cumsum(arrays.mask)))[_bounds(arrays)]
    rows = arrays.rows[selection]
    gone = np.delete(arrays.full_lengths, arrays.rows)
    return Report(
        rows=len(selection) + dropped,
        tokens=int(np.diff(_bounds(arrays), prepend=0)[selection].sum()),
        trained_tokens=int(np.diff(trained, prepend=0)[selection].sum()),
        longest=int(max(arrays.full_lengths[rows].max(initial=0), gone.max(initial=0) if dropped else 0)),
        truncated=int(arrays.cut[selection].sum()),
        dropped=dropped,
        untrained=untrained,
    )


def _bounds(arrays: Arrays) -> np.ndarray:
    """[U] the token after each unit."""
    return arrays.sample_ends[arrays.unit_ends - 1]
