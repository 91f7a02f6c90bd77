"""Only what has changed since the last time, compressed, and with a checksum of what it makes."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from whet.weights.buckets import num_bytes, short

KEY = "whet.delta"
"""Key of a file's metadata under which it says how its tensors follow from those that came before."""
LEVEL = 1
"""Of the compression: a higher one takes longer than the wire."""


@dataclass
class Deltas:
    """What was last published, held on the CPU in the type that it was sent in, and what is new since.

    A tensor whose bytes are the same is not sent. Of another, its bytes or their exclusive or with the last ones are
    compressed, whichever is smaller; bytes of equal weight stand together, for signs and exponents repeat.
    """

    last: dict[str, Tensor] = field(default_factory=dict)
    raw_bytes: int = 0
    """Bytes of all tensors of the last pass."""

    def encode(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Name, compressed bytes, and how they are to be read, of every tensor that has changed."""
        self.raw_bytes = 0
        for name, tensor in tensors:
            now = tensor.detach().cpu().contiguous().clone()
            self.raw_bytes += num_bytes(now)
            before = self.last.get(name)
            new = now.view(-1).view(torch.uint8)
            if before is not None and before.dtype == now.dtype and before.shape == now.shape:
                old = before.view(-1).view(torch.uint8)
                if torch.equal(old, new):
                    continue
                candidates = {"full": new, "xor": old ^ new}
            else:
                candidates = {"full": new}
            packed = {kind: _packed(data, now.element_size()) for kind, data in candidates.items()}
            kind = min(packed, key=lambda one: len(packed[one]))
            self.last[name] = now
            entry = {
                "kind": kind,
                "dtype": short(now.dtype),
                "shape": list(now.shape),
                "width": now.element_size(),
                "crc32": zlib.crc32(new.numpy().tobytes()),
            }
            yield name, torch.frombuffer(bytearray(packed[kind]), dtype=torch.uint8), entry

    def forget(self) -> None:
        """The next pass is sent in full."""
        self.last.clear()


class Changes:
    """Which tensors are others than those last sent, by a digest of each: for ways that take no compressed bytes."""

    def __init__(self) -> None:
        self._sent: dict[str, bytes] = {}

    def of(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Those that have changed; they count as sent."""
        for name, tensor in tensors:
            plain = tensor.detach().cpu().contiguous()
            digest = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)}".encode(), digest_size=16)
            digest.update(plain.view(-1).view(torch.uint8).numpy())
            if self._sent.get(name) != (found := digest.digest()):
                self._sent[name] = found
                yield name, tensor

    def forget(self) -> None:
        """The next pass is sent in full: somebody has none of it, or it is not known what arrived."""
        self._sent.clear()


def metadata(entries: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What a file says of the tensors it holds."""
    return {KEY: json.dumps(entries)}


def _packed(data: Tensor, width: int) -> bytes:
    return zlib.compress(data.view(-1, width).t().contiguous().numpy().tobytes(), LEVEL)
