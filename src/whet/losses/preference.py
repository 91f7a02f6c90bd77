"""Losses that compare a chosen with a rejected completion, both measured against a reference.

Each is a formula over `Pairs`: Δ is a completion's log-ratio to the reference (`chosen`, `rejected`), d the
difference of the two, δ that of their means per token; one value per pair [U]. `whet.losses.pairs.pair_loss`
adds the options that they share.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.losses.pairs import Beta, Pairs, Smoothing, pair_loss, smoothed


@pair_loss(f_divergence=True)
def sigmoid(pairs: Pairs, *, beta: Beta = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """-(1 - ε) log σ(βd) - ε log σ(-βd). Source: DPO, arXiv:2305.18290, eq. 7; ε: cDPO, Mitchell 2023."""
    return smoothed(beta * pairs.difference, label_smoothing)


@pair_loss(f_divergence=True)
def sigmoid_norm(pairs: Pairs, *, beta: Beta = 0.1) -> Tensor:
    """-log σ(βδ): DPO on means per token. Source: Tülu 3, arXiv:2411.15124."""
    return -F.logsigmoid(beta * pairs.mean_difference)


@pair_loss(f_divergence=True)
def robust(pairs: Pairs, *, beta: Beta = 0.1, label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0) -> Tensor:
    """[-(1 - ε) log σ(βd) + ε log σ(-βd)] / (1 - 2ε): unbiased when a share ε of the labels is flipped.

    Source: arXiv:2403.00409.
    """
    logits = beta * pairs.difference
    clean, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@pair_loss(f_divergence=True)
def hinge(pairs: Pairs, *, beta: Beta = 0.1) -> Tensor:
    """max(0, 1 - βd). Source: SLiC, arXiv:2305.10425, on log-ratios."""
    return F.relu(1 - beta * pairs.difference)


@pair_loss(f_divergence=True)
def ipo(pairs: Pairs, *, beta: Beta = 0.1) -> Tensor:
    """(δ - 1 / (2β))², on means per token as its authors confirmed. Source: arXiv:2310.12036, eq. 17."""
    return (pairs.mean_difference - 1 / (2 * beta)).square()


@pair_loss(f_divergence=True)
def exo_pair(
    pairs: Pairs, *, beta: Beta = 0.1, label_smoothing: Annotated[float, Field(gt=0, le=0.5)] = 1e-3
) -> Tensor:
    """KL(softmax(βΔ of both) ‖ (1 - ε, ε)); ε of 0 would make it infinite. Source: arXiv:2402.00856, eq. 16."""
    logits = beta * pairs.difference
    chosen = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    rejected = (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return chosen + rejected


@pair_loss(f_divergence=True)
def discopop(pairs: Pairs, *, beta: Beta = 0.1, tau: Annotated[float, Field(gt=0, le=1)] = 0.05) -> Tensor:
    """(1 - g) (-log σ(z)) + g e^-z with z = βd, g = σ(z / τ). Source: arXiv:2406.08414, eq. 5."""
    z = beta * pairs.difference
    # One exponent: g vanishes faster than e^-z grows, but each for itself overflows.
    exponential = (F.logsigmoid(z / tau) - z).exp()
    return -(-z / tau).sigmoid() * F.logsigmoid(z) + exponential


@pair_loss()
def nca_pair(pairs: Pairs, *, beta: Beta = 0.1) -> Tensor:
    """-log σ(βΔ_w) - ½ log σ(-βΔ_w) - ½ log σ(-βΔ_r). Source: arXiv:2402.05369."""
    chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@pair_loss(reads=("reward_mean",))
def bco_pair(pairs: Pairs, *, beta: Beta = 0.1, running_mean: bool = True) -> Tensor:
    """-log σ(βΔ_w - κ) - log σ(-(βΔ_r - κ)), κ the running mean of the rewards; without `running_mean` κ is 0.

    Source: arXiv:2404.04656.
    """
    shift = pairs.batch["reward_mean"][0::2] if running_mean else 0.0
    return -F.logsigmoid(beta * pairs.chosen - shift) - F.logsigmoid(shift - beta * pairs.rejected)


@pair_loss()
def sppo_hard(pairs: Pairs, *, beta: Beta = 0.1) -> Tensor:
    """(Δ_w - 1 / (2β))² + (Δ_r + 1 / (2β))²: chosen always wins. Source: arXiv:2405.00675, eq. 4.7."""
    target = 1 / (2 * beta)
    return (pairs.chosen - target).square() + (pairs.rejected + target).square()


@pair_loss()
def apo_zero(pairs: Pairs, *, beta: Beta = 0.1) -> Tensor:
    """1 - σ(βΔ_w) + σ(βΔ_r): for chosen completions better than the model's. Source: arXiv:2408.06266, eq. 7."""
    return torch.sigmoid(-beta * pairs.chosen) + torch.sigmoid(beta * pairs.rejected)


@pair_loss()
def apo_down(pairs: Pairs, *, beta: Beta = 0.1) -> Tensor:
    """σ(βΔ_w) + 1 - σ(βd): for chosen completions worse than the model's. Source: arXiv:2408.06266, eq. 8."""
    return torch.sigmoid(beta * pairs.chosen) + torch.sigmoid(-beta * pairs.difference)
