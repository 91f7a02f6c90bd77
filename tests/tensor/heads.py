"""Heads made of plain tensors, chunks of a few rows, and how large tensors get, for tests of the chunked head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from whet.tensor import logits


@dataclass
class Head:
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def rows_per_chunk(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Chunks of so many rows, whatever the vocabulary: `chunk_mb` counts whole MiB, too coarse for a test."""
    plain = logits.HeadSpec.of
    monkeypatch.setattr(logits.HeadSpec, "of", lambda *args: replace(plain(*args), rows=rows))


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *found])
        return out
