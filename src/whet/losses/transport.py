"""Alignment by optimal transport: the whole batch's chosen side is to be ahead of its rejected side, rank by rank.

Which numbers meet depends on the order over the global batch. `aot_partners` looks that up once, so that each
pair's value and gradient are those of the whole batch in whatever micro-batches it is computed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whet.batch import Batch
from whet.losses.pairs import Beta, Pairs, Smoothing, chosen_rejected, compare, pair_loss, smoothed


@pair_loss(reads=("aot_reference",), wpo=False)
def aot(pairs: Pairs, *, beta: Beta = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """Smoothed sigmoid loss of β(x - y): x the policy's L_w - L_r, y the reference's of the same rank.

    Source: arXiv:2406.05882, the paired variant.
    """
    chosen, rejected = chosen_rejected(pairs.logps)
    return smoothed(beta * (chosen - rejected - pairs.batch["aot_reference"]), label_smoothing)


@pair_loss(reads=("aot_rejected", "aot_chosen"), wpo=False)
def aot_unpaired(pairs: Pairs, *, beta: Beta = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """Smoothed sigmoid loss of β(Δ_w - Δ_r), Δ_r the rejected log-ratio of the same rank, of whichever unit.

    Source: arXiv:2406.05882, the unpaired variant.
    """
    values = smoothed(beta * (pairs.chosen - pairs.batch["aot_rejected"]), label_smoothing)
    # The own rejected completion counts in the value of another unit, which may be in another micro-batch: here it
    # adds the gradient that is its due there, and nothing to the value.
    elsewhere = smoothed(beta * (pairs.batch["aot_chosen"] - pairs.rejected), label_smoothing)
    return values + (elsewhere - elsewhere.detach())


@torch.no_grad()
def aot_partners(logprobs: Tensor, batch: Batch, *, ld_alpha: float = 1.0) -> Mapping[str, Tensor]:
    """The columns `aot_reference`, `aot_rejected` and `aot_chosen`, [U] each, of the global batch.

    `logprobs` [T] are the policy's, `batch` carries `ref_logprobs`; `ld_alpha` as the loss has it.
    """
    pairs = compare(logprobs, batch["ref_logprobs"], batch, ld_alpha)
    chosen, rejected = chosen_rejected(pairs.logps)
    reference_chosen, reference_rejected = chosen_rejected(pairs.logps - pairs.ratios)
    return {
        "aot_reference": _of_same_rank(chosen - rejected, reference_chosen - reference_rejected),
        "aot_rejected": _of_same_rank(pairs.chosen, pairs.rejected),
        "aot_chosen": _of_same_rank(pairs.rejected, pairs.chosen),
    }


def _of_same_rank(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` [U] that one of `others` [U] which has its rank; equal values keep their order."""
    partners = torch.empty_like(others)
    partners[values.argsort(stable=True)] = others.sort(stable=True).values
    return partners
