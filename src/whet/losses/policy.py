"""Policy-gradient losses, the penalty towards a reference, and the entropy bonus."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from whet.batch import Batch
from whet.losses.base import Metrics, Outputs, loss
from whet.tensor.kl import kl_estimate


@loss(outputs=("logprobs", "entropy"), reads=("advantages",))
def ppo_clip(
    out: Outputs,
    batch: Batch,
    *,
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2,
    clip_high: Annotated[float, Field(ge=0)] = 0.28,
    dual_clip: Annotated[float | None, Field(gt=1)] = None,
) -> tuple[Tensor, Metrics]:
    """max(-ρA, -clip(ρ, 1 - clip_low, 1 + clip_high) A) per token [T], ρ = policy / old policy.

    `dual_clip` c bounds the loss by -cA where A < 0. Without a column `old_logprobs` the batch is on-policy:
    ρ is 1 and only its gradient matters.
    Sources: arXiv:1707.06347 eq. 7; clip-higher arXiv:2503.14476; dual clip arXiv:1912.09729.
    """
    logprobs, advantages = out["logprobs"], batch["advantages"]
    old = _old_logprobs(out, batch)
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    values = torch.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip is not None:
        values = torch.where(advantages < 0, torch.minimum(values, -dual_clip * advantages), values)
    metrics = {
        "clip_fraction_low": (ratio < 1 - clip_low) & (advantages < 0),
        "clip_fraction_high": (ratio > 1 + clip_high) & (advantages > 0),
    }
    return values, metrics | _policy_metrics(out, batch, ratio)


@loss(outputs=("logprobs", "entropy"), reads=("advantages",))
def reinforce(out: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
    """-A log p per token [T]. Source: Williams 1992; arXiv:2402.14740."""
    logprobs = out["logprobs"]
    return -batch["advantages"] * logprobs, _policy_metrics(out, batch, (logprobs - _old_logprobs(out, batch)).exp())


@loss(reads=("ref_logprobs",))
def kl(out: Outputs, batch: Batch, *, type: Literal["k2", "k3", "low_var_kl"] = "k3") -> tuple[Tensor, Metrics]:
    """Estimated KL divergence from the reference per token [T]; k1 has no useful gradient and is left out."""
    values = kl_estimate(out["logprobs"], batch["ref_logprobs"], type)
    return values, {"kl": values.detach()}


@loss(outputs=("entropy",))
def entropy_bonus(out: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
    """Minus the entropy per token [T], in nats."""
    return -out["entropy"], {}


def _old_logprobs(out: Outputs, batch: Batch) -> Tensor:
    return batch["old_logprobs"] if "old_logprobs" in batch else out["logprobs"].detach()


def _policy_metrics(out: Outputs, batch: Batch, ratio: Tensor) -> Metrics:
    """What every policy loss reports, [T] each."""
    old, logprobs = _old_logprobs(out, batch), out["logprobs"].detach()
    metrics = {
        "ppo_kl": old - logprobs,
        "importance_weight": ratio.detach(),
        "importance_weight_max": ratio.detach(),
        "entropy": out["entropy"].detach(),
    }
    if "sampler_logprobs" in batch:
        difference = (old - batch["sampler_logprobs"]).abs()
        metrics |= {"train_rollout_logprob_abs_diff": difference, "train_rollout_logprob_abs_diff_max": difference}
    return metrics
