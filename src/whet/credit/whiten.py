"""Whitening: advantages with mean 0 and variance 1 over the trained tokens of the global batch."""

from __future__ import annotations

import torch

from whet.batch import Batch
from whet.credit.base import credit

EPSILON = 1e-8


@credit(reads=("advantages",))
def whiten(batch: Batch) -> Batch:
    """(A - mean) / std over all trained tokens, variance unbiased. Exactly 0 where all advantages are the same."""
    values = batch["advantages"][batch.loss_mask]
    if len(values) == 0 or values.min() == values.max():  # rounding must not make a difference of none
        return batch.with_columns(advantages=torch.zeros_like(batch["advantages"]))
    exact = values.double()
    scale = 1 / (exact.var() + EPSILON).sqrt()
    whitened = ((batch["advantages"].double() - exact.mean()) * scale).to(values.dtype)
    return batch.with_columns(advantages=torch.where(batch.loss_mask, whitened, 0.0))
