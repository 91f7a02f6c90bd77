"""Keys and values in pages: each row has a table of its pages, and rows that begin alike share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from whet.engines.local.cache import Held, Layers

PAGE = 256
"""Positions of a page: what flash attention's kernel wants of a paged cache."""
SCRATCH = 0
"""The page that belongs to nobody: a table is filled up with it, and rows that only fill up a graph write there."""

Kernel = Callable[..., Tensor]
"""Attention over pages: `torch.nn.attention.varlen.varlen_attn`, or what takes the same."""


@dataclass(frozen=True)
class Paging:
    """How keys and values lie in pages, and what attends to them there; None: they are copied together for that."""

    kernel: Kernel | None = None
    page: int = PAGE


PAGING = Paging()


class PagedCache(Held):
    """Per layer a pool of pages, keys [pages, page, Hkv, D] and values of the same shape (D may differ).

    It serves as `SlotCache` does, but memory follows what is written: a row takes a page when it grows into it and
    gives its pages back at once when it is dropped, and to copy or move a row only its table is written. A page that
    several rows hold is copied for the row that is about to write to it (`ready`).
    """

    shares = True
    """Whether a copy costs no memory, so that what several rows begin with is written once."""

    def __init__(
        self, max_rows: int, max_length: int | None, dtype: torch.dtype | None = None, paging: Paging = PAGING
    ):
        self.max_rows = max_rows
        self.max_length = max_length
        self.dtype = dtype
        """Type in which keys and values are held; None: the one they come in."""
        self.kernel, self.page = paging.kernel, paging.page
        self.clear()

    def clear(self) -> None:
        """Let go of all memory."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.table = np.zeros((self.max_rows, 1), dtype=np.int32)
        """[max_rows, pages] numbers of each row's pages in order; SCRATCH behind its last."""
        self._holders = np.ones(1, dtype=np.int64)
        """By page, how many rows hold it; that of SCRATCH stays 1."""
        self._free: list[int] = []

    @property
    def num_used(self) -> int:
        """Pages that rows hold, each counted once."""
        return len(self._holders) - 1 - len(self._free)

    def reserve(self, rows: int, length: int) -> None:
        """Make room for what rows that share all but their last page take; more comes as they grow into it.

        Growing moves the pools, and what points at them is made anew: once is better than at every row that joins.
        """
        assert rows <= self.max_rows, f"{rows} rows reserved of {self.max_rows}"
        if (missing := 1 + rows + -(-length // self.page) - len(self._holders)) > 0:
            self._grow(missing)

    @torch.inference_mode()
    def ready(self, slots: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray, ends: np.ndarray) -> None:
        """Before positions `starts[i]` to `ends[i]` of slot `slots[i]` are written: it has the pages, and alone."""
        slots, first, last = np.asarray(slots), np.asarray(starts) // self.page, (np.asarray(ends) - 1) // self.page
        self._widen(int(last.max()) + 1)
        rows = np.repeat(slots, last - first + 1)
        columns = np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)])
        pages = self.table[rows, columns]
        wanted = np.flatnonzero((pages == SCRATCH) | (self._holders[pages] > 1))
        if not len(wanted):
            return
        new = self._take(len(wanted))
        sources, targets = [], []
        for row, column, page, fresh in zip(rows[wanted], columns[wanted], pages[wanted], new, strict=True):
            # The last of those who shared it keeps it: by then the others have copies.
            if page != SCRATCH and self._holders[page] == 1:
                self._give_back(fresh)
                continue
            self.table[row, column] = fresh
            if page != SCRATCH:
                self._holders[page] -= 1
                sources.append(int(page))
                targets.append(fresh)
        if sources:
            for held in self.tensors:
                held[targets] = held[sources]

    @torch.inference_mode()
    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The pools of one layer; at first in the shape of this call's `key` and `value` [_, Hkv, _, D]."""
        if index not in self._layers:
            self._layers[index] = self._empty(key), self._empty(value)
        return self._layers[index]

    def copy(self, source: int, target: int, length: int) -> None:
        """Let another slot hold the pages of the first `length` positions as well."""
        self.drop(target)
        count = -(-length // self.page)
        pages = self.table[source, :count]
        assert SCRATCH not in pages, f"slot {source} does not hold {length} positions"
        self.table[target, :count] = pages
        self._holders[pages] += 1  # the pages of a row are distinct

    def move(self, source: int, target: int, length: int) -> None:
        """Give what a slot holds to another one, whose own pages go."""
        self.drop(target)
        self.table[target], self.table[source] = self.table[source], SCRATCH

    def drop(self, slot: int, length: int = 0) -> None:
        """Give back the pages of a slot, but for those of its first `length` positions."""
        held = self.table[slot, -(-length // self.page) :]
        for page in held[held != SCRATCH].tolist():
            self._holders[page] -= 1
            if not self._holders[page]:
                self._give_back(page)
        held[:] = SCRATCH

    @torch.inference_mode()
    def read(self, slot: int, length: int) -> Layers:
        """A copy of the first `length` positions of a slot, [Hkv, length, D] each."""
        pages = self.table[slot, : -(-length // self.page)].tolist()
        found = {}
        for index, pools in self._layers.items():
            keys, values = (x[pages].flatten(0, 1)[:length].transpose(0, 1).contiguous() for x in pools)
            found[index] = keys, values
        return found

    @torch.inference_mode()
    def write(self, slot: int, layers: Layers, length: int) -> None:
        """Put the first `length` positions of what `read` gave into a slot."""
        self.drop(slot)
        self.ready([slot], [0], np.array([length]))
        pages, offsets = self.places(np.full(length, slot), np.arange(length))
        for index, held in layers.items():
            for pool, source in zip(self.layer(index, *(x[None] for x in held)), held, strict=True):
                pool[pages, offsets] = source[:, :length].transpose(0, 1)

    def places(self, slots: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pages, and offsets in them, of positions of slots: int64 arrays of the same length."""
        return self.table[slots, positions // self.page].astype(np.int64), positions % self.page

    def tables(self, slots: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Pages of the first `length` positions of slots, [slots, pages] int32; SCRATCH where a slot has fewer."""
        count = -(-length // self.page)
        self._widen(count)
        return np.ascontiguousarray(self.table[np.asarray(slots), :count])

    def num_bytes(self, length: int) -> int:
        """Memory of `length` positions of one slot in all layers; 0 before anything was written."""
        return sum(length * x.shape[2] * x.shape[3] * x.element_size() for x in self.tensors)

    def _widen(self, columns: int) -> None:
        if (missing := columns - self.table.shape[1]) > 0:
            self.table = np.pad(self.table, ((0, 0), (0, max(missing, self.table.shape[1]))))

    def _take(self, count: int) -> list[int]:
        """Numbers of pages that nobody had, each now held once."""
        if len(self._free) < count:
            self._grow(count - len(self._free))
        pages = [self._free.pop() for _ in range(count)]
        self._holders[pages] = 1
        return pages

    def _give_back(self, page: int) -> None:
        self._holders[page] = 0
        self._free.append(page)

    @torch.inference_mode()
    def _grow(self, missing: int) -> None:
        """Enlarge the pools by half at least, but not beyond what all rows together can ever hold."""
        size = len(self._holders)
        needed, larger = size + missing, size * 3 // 2
        if self.max_length is not None:
            larger = min(larger, 1 + self.max_rows * -(-self.max_length // self.page))
        pages = max(needed, larger)
        self._free += range(pages - 1, size - 1, -1)  # taken from the end: the lowest first
        self._holders = np.pad(self._holders, (0, pages - size))
        for index, (keys, values) in self._layers.items():  # one at a time: only one layer exists twice
            self._layers[index] = self._enlarged(keys), self._enlarged(values)

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros: a position not yet written is masked, but what lies there must not be NaN.
        shape = len(self._holders), self.page, like.shape[1], like.shape[3]
        return torch.zeros(shape, dtype=self.dtype or like.dtype, device=like.device)

    def _enlarged(self, held: Tensor) -> Tensor:
        new = held.new_zeros(len(self._holders), *held.shape[1:])
        new[: len(held)] = held
        return new
