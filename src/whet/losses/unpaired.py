"""Losses on single completions that are labelled desirable or not, measured against a reference."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.batch import Batch
from whet.losses.base import Metrics, Outputs, loss
from whet.losses.pairs import Beta

Weight = Annotated[float, Field(ge=0)]
"""How much a completion counts, by its label."""


@loss(reads=("ref_logprobs", "labels", "kl_baseline"), per="sequence")
def kto(
    out: Outputs, batch: Batch, *, beta: Beta = 0.1, desirable_weight: Weight = 1.0, undesirable_weight: Weight = 1.0
) -> tuple[Tensor, Metrics]:
    """w (1 - σ(β(Δ - z))) of a desirable, w (1 - σ(β(z - Δ))) of an undesirable completion, per sequence [N].

    z is `kl_baseline`, an estimate of the KL divergence from the reference: the same for the whole batch, and at
    least 0. Source: arXiv:2402.01306.
    """
    ratios, logps = _log_ratios(out, batch)
    z = batch["kl_baseline"]
    sign, weight = _sides(batch, desirable_weight, undesirable_weight)
    values = weight * torch.sigmoid(-sign * beta * (ratios - z))
    return values, _metrics(batch, beta * ratios, logps) | {"kl": z}


@loss(reads=("ref_logprobs", "labels"), per="sequence")
def apo_zero_unpaired(
    out: Outputs, batch: Batch, *, beta: Beta = 0.1, desirable_weight: Weight = 1.0, undesirable_weight: Weight = 1.0
) -> tuple[Tensor, Metrics]:
    """w (1 - σ(βΔ)) of a desirable, w σ(βΔ) of an undesirable completion, per sequence [N].

    Source: arXiv:2408.06266, eq. 7, each side by itself.
    """
    ratios, logps = _log_ratios(out, batch)
    sign, weight = _sides(batch, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-sign * beta * ratios), _metrics(batch, beta * ratios, logps)


@loss(reads=("ref_logprobs", "labels", "reward_mean"), per="sequence")
def bco(
    out: Outputs, batch: Batch, *, beta: Beta = 0.1, desirable_weight: Weight = 1.0, undesirable_weight: Weight = 1.0
) -> tuple[Tensor, Metrics]:
    """-w log σ(βΔ - κ) of a desirable, -w log σ(-(βΔ - κ)) of an undesirable completion, per sequence [N].

    κ is the running mean of the rewards βΔ, `reward_mean`. Source: arXiv:2404.04656.
    """
    ratios, logps = _log_ratios(out, batch)
    sign, weight = _sides(batch, desirable_weight, undesirable_weight)
    values = -weight * F.logsigmoid(sign * (beta * ratios - batch["reward_mean"]))
    return values, _metrics(batch, beta * ratios, logps)


def _log_ratios(out: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """Δ = L - L_ref and L of each sequence, [N] both, float32."""
    logprobs = out["logprobs"].float()
    return batch.sum_tokens(logprobs - batch["ref_logprobs"].float()), batch.sum_tokens(logprobs)


def _sides(batch: Batch, desirable_weight: float, undesirable_weight: float) -> tuple[Tensor, Tensor]:
    """1 or -1, and the weight, of each sequence [N], by its label."""
    labels = batch["labels"]
    return 2 * labels - 1, torch.where(labels > 0, desirable_weight, undesirable_weight)


def _metrics(batch: Batch, rewards: Tensor, logps: Tensor) -> Metrics:
    """Rewards and logprobs [N] of each side, NaN on the rows of the other."""
    desirable = batch["labels"] > 0
    return {
        f"{name}/{side}": torch.where(mine, values.detach(), torch.nan)
        for name, values in (("rewards", rewards), ("logps", logps))
        for side, mine in (("chosen", desirable), ("rejected", ~desirable))
    }
