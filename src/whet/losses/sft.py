"""Supervised losses: learn to say what the data says."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from whet.batch import Batch
from whet.losses.base import Metrics, Outputs, loss


@loss(outputs=("logprobs", "correct", "entropy"), outputs_if={"label_smoothing": ("mean_logprobs",)})
def sft(
    out: Outputs, batch: Batch, *, label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
) -> tuple[Tensor, Metrics]:
    """Cross-entropy per token [T] in nats; `label_smoothing` spreads that share of it over the vocabulary."""
    values = -out["logprobs"]
    if label_smoothing:
        values = (1 - label_smoothing) * values - label_smoothing * out["mean_logprobs"]
    return values, {"mean_token_accuracy": out["correct"], "entropy": out["entropy"]}


@loss(outputs=("logprobs", "correct", "entropy"))
def dft(out: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
    """Dynamic fine-tuning, cross-entropy per token [T] scaled by the token's own probability.

    Source: arXiv:2508.05629, eq. 9.
    """
    values = -out["logprobs"].detach().exp() * out["logprobs"]
    return values, {"mean_token_accuracy": out["correct"], "entropy": out["entropy"]}


@loss()
def nll(out: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
    """Cross-entropy per token [T] in nats and nothing else: the term that goes with a preference loss."""
    return -out["logprobs"], {}
