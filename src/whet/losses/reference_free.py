"""Losses that compare a chosen with a rejected completion by the policy alone, without a reference.

The cross-entropy of the chosen completions that CPO, CPO-SimPO and ORPO add is a term of its own (`sft` on the
chosen completions), with its own weight.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, ValidationInfo
from torch import Tensor

from whet.batch import Batch
from whet.losses.base import Metrics, Outputs, loss
from whet.losses.pairs import Beta, Smoothing, chosen_rejected, pair_metrics, smoothed

BOTH = "gamma is set too, and gamma_ratio says the same (gamma / beta); give one of them"


def _alone(ratio: float | None, info: ValidationInfo) -> float | None:
    if ratio is not None and info.data.get("gamma") is not None:
        raise ValueError(BOTH)
    return ratio


@loss(per="pair")
def simpo(
    out: Outputs,
    batch: Batch,
    *,
    beta: Beta = 2.0,
    gamma: Annotated[float | None, Field(ge=0)] = None,
    gamma_ratio: Annotated[float | None, Field(ge=0), AfterValidator(_alone)] = None,
    label_smoothing: Smoothing = 0.0,
) -> tuple[Tensor, Metrics]:
    """-log σ(β(l_w - l_r) - γ) per pair [U], l mean logprob per token; with ε the smoothed form.

    The margin is `gamma` (1.0), on the scale of β times l. It can also be given as `gamma_ratio` = γ / β (0.5),
    on the scale of l, which stays the same when β changes: -log σ(β(l_w - l_r - γ / β)). The reported `logps`
    are means per token. Source: arXiv:2405.14734, eq. 6.
    """
    if gamma_ratio is not None:
        if gamma is not None:
            raise ValueError(BOTH)
        gamma = gamma_ratio * beta
    means = batch.mean_tokens(out["logprobs"].float())
    chosen, rejected = chosen_rejected(means)
    margin = 1.0 if gamma is None else gamma
    return smoothed(beta * (chosen - rejected) - margin, label_smoothing), pair_metrics(beta * means, means)


@loss(per="pair")
def cpo(out: Outputs, batch: Batch, *, beta: Beta = 0.1, label_smoothing: Smoothing = 0.0) -> tuple[Tensor, Metrics]:
    """-log σ(β(L_w - L_r)) per pair [U], L summed logprob; with ε the smoothed form. Source: arXiv:2401.08417."""
    sums = batch.sum_tokens(out["logprobs"].float())
    chosen, rejected = chosen_rejected(sums)
    return smoothed(beta * (chosen - rejected), label_smoothing), pair_metrics(beta * sums, sums)


@loss(per="pair")
def orpo(out: Outputs, batch: Batch, *, beta: Beta = 0.1) -> tuple[Tensor, Metrics]:
    """-β log σ(log odds(l_w) - log odds(l_r)) per pair [U], l mean logprob per token, odds p / (1 - p).

    The reported `logps` are means per token. Source: arXiv:2403.07691, eq. 7.
    """
    means = batch.mean_tokens(out["logprobs"].float())
    chosen, rejected = chosen_rejected(means)
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    ratio = F.logsigmoid(log_odds)
    metrics = {"log_odds_ratio": ratio.detach(), "log_odds_chosen": log_odds.detach()}
    return -beta * ratio, pair_metrics(beta * means, means) | metrics


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, float32, exact to rounding; a certainty (x of 0) counts as 1 - eps.

    Source: Mächler 2012, Accurately computing log(1 - exp(-|a|)).
    """
    x = x.clamp(max=-torch.finfo(torch.float32).eps)
    # Where one branch is not exact it is at least finite, and so is its gradient.
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))
