"""Keys and values of the rows being decoded: per layer two tensors, one slot per row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ROW_BLOCK = 16
LENGTH_BLOCK = 256
"""The cache grows by whole blocks, and by half its size at least, so that growing is rare."""

Layers = dict[int, tuple[Tensor, Tensor]]
"""By layer the keys and values of one sequence, [Hkv, length, D] each."""


class Held:
    """The tensors of a cache, by layer keys and values."""

    _layers: dict[int, tuple[Tensor, Tensor]]

    @property
    def tensors(self) -> list[Tensor]:
        """Keys and values of all layers; none before anything was written."""
        return [tensor for layer in self._layers.values() for tensor in layer]

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where they lie: growing moves them."""
        return tuple(tensor.data_ptr() for tensor in self.tensors)


class SlotCache(Held):
    """Per layer keys [rows, Hkv, length, D] and values of the same shape (D may differ).

    The layers are separate tensors: one stacked tensor was measured 14 times slower. They are made at the
    first write, in the shape that the model's own keys and values have, and grow to what `reserve` asked for.
    """

    shares = False
    """Whether a copy costs no memory, so that what several rows begin with is written once."""

    def __init__(self, max_rows: int, max_length: int | None, dtype: torch.dtype | None = None):
        self.max_rows = max_rows
        self.max_length = max_length
        self.dtype = dtype
        """Type in which keys and values are held; None: the one they come in."""
        self.clear()

    def clear(self) -> None:
        """Let go of all memory."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows = 0
        self._length = 0

    @torch.inference_mode()
    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` slots of `length` positions."""
        assert rows <= self.max_rows, f"{rows} rows reserved of {self.max_rows}"
        if rows <= self._rows and length <= self._length:
            return
        self._rows = _grown(self._rows, rows, ROW_BLOCK, self.max_rows)
        self._length = _grown(self._length, length, LENGTH_BLOCK, self.max_length)
        for index, (keys, values) in self._layers.items():  # one at a time: only one layer exists twice
            self._layers[index] = self._enlarged(keys), self._enlarged(values)

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of one layer; at first in the shape of this call's `key` and `value` [_, Hkv, _, D]."""
        if index not in self._layers:
            self._layers[index] = self._empty(key), self._empty(value)
        return self._layers[index]

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another, in every layer."""
        for layer in self._layers.values():
            for held in layer:
                held[target, :, :length] = held[source, :, :length]

    def ready(self, slots: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray, ends: np.ndarray) -> None:
        """Before positions `starts[i]` to `ends[i]` of slot `slots[i]` are written: what was reserved suffices."""

    def move(self, source: int, target: int, length: int) -> None:
        """Give the first `length` positions of a slot that is then free to another one."""
        self.copy(source, target, length)

    def drop(self, slot: int, length: int = 0) -> None:
        """What a slot holds behind its first `length` positions is not needed any more: here, it is written over."""

    @torch.inference_mode()
    def read(self, slot: int, length: int) -> Layers:
        """A copy of the first `length` positions of a slot."""
        return {
            index: (keys[slot, :, :length].clone(), values[slot, :, :length].clone())
            for index, (keys, values) in self._layers.items()
        }

    @torch.inference_mode()
    def write(self, slot: int, layers: Layers, length: int) -> None:
        """Put the first `length` positions of what `read` gave into a slot."""
        for index, held in layers.items():
            for target, source in zip(self.layer(index, *(x[None] for x in held)), held, strict=True):
                target[slot, :, :length] = source[:, :length]

    def num_bytes(self, length: int) -> int:
        """Memory of `length` positions of one slot in all layers; 0 before anything was written."""
        return sum(length * x.shape[1] * x.shape[3] * x.element_size() for x in self.tensors)

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros: a position not yet written is masked, but what lies there must not be NaN.
        shape = self._rows, like.shape[1], self._length, like.shape[3]
        return torch.zeros(shape, dtype=self.dtype or like.dtype, device=like.device)

    def _enlarged(self, held: Tensor) -> Tensor:
        new = held.new_zeros(self._rows, held.shape[1], self._length, held.shape[3])
        new[: held.shape[0], :, : held.shape[2]] = held
        return new


def _grown(size: int, needed: int, block: int, limit: int | None) -> int:
    if needed <= size:
        return size
    size = -(-max(needed, size * 3 // 2) // block) * block
    return size if limit is None else max(needed, min(size, limit))
