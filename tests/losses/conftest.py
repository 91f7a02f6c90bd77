"""Batches and model outputs for tests of losses, made of plain numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from whet.batch import Batch, collate
from whet.types import Sample, Unit


@pytest.fixture
def batch_of() -> Callable[..., Batch]:
    """A batch of one-sequence units of these trained lengths, each behind one token of prompt, with columns."""

    def make(*trained: int, per_unit: int = 1, **columns: list[float]) -> Batch:
        samples = [Sample([1] * (n + 1), [False] + [True] * n) for n in trained]
        groups = [samples[i : i + per_unit] for i in range(0, len(samples), per_unit)]
        batch = collate([Unit(str(i), tuple(group)) for i, group in enumerate(groups)])
        return batch.with_columns(**{name: torch.tensor(values) for name, values in columns.items()})

    return make
