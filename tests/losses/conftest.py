"""Batches and model outputs for tests of losses, made of plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


@pytest.fixture
def rows_of(batch_of) -> Callable[..., tuple[dict[str, torch.Tensor], Batch]]:
    """Outputs and batch from the logprobs of trained tokens, row by row, two rows a unit; `refs` alike."""

    def flat(rows: Sequence[Sequence[float]]) -> list[float]:
        return [logprob for row in rows for logprob in (0.0, *row)]

    def make(*rows: Sequence[float], refs: Sequence[Sequence[float]] | None = None, per_unit: int = 2, **columns):
        if refs is not None:
            columns["ref_logprobs"] = flat(refs)
        batch = batch_of(*map(len, rows), per_unit=per_unit, **columns)
        return {"logprobs": torch.tensor(flat(rows), requires_grad=True)}, batch

    return make
