"""Logits of a language-model head: a chunk of rows at a time in one buffer, and a chunk in blocks that fit a cache.

From the logits on, everything is float32 (float64 where the weights are).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK_MB = 128
BLOCK_ELEMENTS = 2**19
"""Logits that are worked on at a time: 2 MiB stay in a core's cache between one operation and the next."""
GPU_BLOCK_ELEMENTS = 2**23
"""The same on a GPU, which would rather have few large operations; it bounds what they need beside the chunk."""


class HeadWeights(Protocol):
    """logits = softcap(scale * (hidden @ weight.T + bias)), weight [V, H], bias [V] or None.

    `softcap(z) = cap * tanh(z / cap)`, left out when softcap is None.
    """

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...


@dataclass(frozen=True)
class HeadSpec:
    """What there is to a head beside its tensors: `dtype` is what it multiplies in, `rows` how many at a time."""

    scale: float
    softcap: float | None
    dtype: torch.dtype
    rows: int

    @classmethod
    def of(cls, head: HeadWeights, width: int, chunk_mb: int) -> HeadSpec:
        """For chunks of `chunk_mb` MiB, where a row takes `width` numbers."""
        device = head.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        rows = chunk_mb * 2**20 // (torch.promote_types(dtype, torch.float32).itemsize * width)
        return cls(head.scale, head.softcap, dtype, max(1, rows))


class Scratch:
    """Working memory by name, used over and over."""

    def __init__(self, like: Tensor):
        self._like = like
        self._buffers: dict[object, Tensor] = {}

    def __call__(self, name: object, rows: int, width: int) -> Tensor:
        """[rows, width], with whatever was left there."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * width:
            buffer = self._buffers[name] = self._like.new_empty(rows * width)
        return buffer[: rows * width].view(rows, width)


class Block:
    """A few rows of logits `z` [m, V], which are `rows` of the whole and `local` of their chunk."""

    def __init__(self, rows: slice, local: slice, z: Tensor, scratch: Scratch):
        self.rows, self.local, self.z = rows, local, z
        self._scratch = scratch
        self._logp: dict[tuple[float, int], Tensor] = {}

    def space(self, name: object, width: int) -> Tensor:
        """Working memory [m, width]."""
        return self._scratch(name, len(self.z), width)

    def log_softmax(self, temperature: float, width: int) -> Tensor:
        """log softmax(z / temperature) over the first `width` words; shared among those who ask, not to be changed.

        `z` may be overwritten afterwards.
        """
        key = temperature, width
        if key not in self._logp:
            out = self.space(("log_softmax", key), width)
            self._logp[key] = torch.ops.aten._log_softmax.out(self._scaled(*key), -1, False, out=out)
        return self._logp[key]

    def softmax(self, temperature: float, width: int, out: Tensor) -> None:
        """Write softmax(z / temperature) over the first `width` words to `out`, which may be `z` itself."""
        if (logp := self._logp.get((temperature, width))) is not None:
            torch.exp(logp, out=out)
            return
        between = self.space("softmax", width)
        out.copy_(torch.ops.aten._softmax.out(self._scaled(temperature, width), -1, False, out=between))

    def _scaled(self, temperature: float, width: int) -> Tensor:
        if temperature == 1 and width == self.z.shape[1]:
            return self.z
        return torch.div(self.z[:, :width], temperature, out=self.space("scaled", width))


class Logits:
    """Logits chunk by chunk in one buffer that is used over and over, worked on in blocks that fit a cache."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: HeadSpec):
        self.hidden, self.weight, self.bias, self.spec = hidden.to(spec.dtype), weight.to(spec.dtype), bias, spec
        self.spans = even_spans(len(hidden), spec.rows)
        self.like = hidden.new_empty(0, dtype=torch.promote_types(spec.dtype, torch.float32))
        """An empty tensor on the device, of the type that logits and what follows from them have."""
        self.scratch = Scratch(self.like)
        self._longest = max((s.stop - s.start for s in self.spans), default=1)

    def chunk(self, span: slice) -> Tensor:
        """Scaled logits [m, V] of this span, soft-capped, before temperature; overwrites the last chunk."""
        out = self.scratch("chunk", self._longest, len(self.weight))[: span.stop - span.start]
        if self.spec.dtype == out.dtype:
            torch.mm(self.hidden[span], self.weight.t(), out=out)
        else:
            out.copy_(self.hidden[span] @ self.weight.t())
        if self.bias is not None:
            out += self.bias
        if self.spec.scale != 1:
            out.mul_(self.spec.scale)
        return out.div_(self.spec.softcap).tanh_().mul_(self.spec.softcap) if self.spec.softcap else out

    def blocks(self, chunk: Tensor, span: slice) -> Iterator[Block]:
        """The chunk of this span, a few rows at a time."""
        elements = BLOCK_ELEMENTS if chunk.device.type == "cpu" else GPU_BLOCK_ELEMENTS
        rows = max(1, elements // len(self.weight))
        for start in range(0, len(chunk), rows):
            z = chunk[start : start + rows]
            stop = start + len(z)
            yield Block(slice(span.start + start, span.start + stop), slice(start, stop), z, self.scratch)


def even_spans(count: int, most: int) -> list[slice]:
    """As few spans of at most `most` as can be, all about as long: the last, which is kept, should not be a rest."""
    parts = -(-count // most)
    return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
