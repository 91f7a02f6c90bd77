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
    ratio = _log_ratio(out, batch).exp()
    values, metrics = _clipped(ratio, batch["advantages"], clip_low, clip_high, dual_clip)
    return values, metrics | _policy_metrics(out, batch, ratio)


@loss(outputs=("logprobs", "entropy"), reads=("advantages",))
def gspo(
    out: Outputs,
    batch: Batch,
    *,
    clip_low: Annotated[float, Field(ge=0, le=1)] = 3e-4,
    clip_high: Annotated[float, Field(ge=0)] = 4e-4,
    dual_clip: Annotated[float | None, Field(gt=1)] = None,
) -> tuple[Tensor, Metrics]:
    """`ppo_clip` with one ratio per sequence, the same on each of its tokens [T]: ρ = exp(mean of log ratios).

    The mean goes over the trained tokens of the sequence, and the gradient through it.
    Source: arXiv:2507.18071, section 4.1.
    """
    ratio = batch.mean_tokens(_log_ratio(out, batch)).exp()[batch.sequence_ids]
    values, metrics = _clipped(ratio, batch["advantages"], clip_low, clip_high, dual_clip)
    return values, metrics | _policy_metrics(out, batch, ratio)


@loss(outputs=("logprobs", "entropy"), reads=("advantages",))
def cispo(out: Outputs, batch: Batch, *, clip_high: Annotated[float, Field(ge=0)] = 4.0) -> tuple[Tensor, Metrics]:
    """-min(ρ, 1 + clip_high) A log p per token [T], without gradient through the bounded ratio ρ.

    A token whose ratio is bounded still learns. Sources: arXiv:2506.13585; the bound of 5, arXiv:2510.13786.
    """
    ratio = _log_ratio(out, batch).exp()
    weight = ratio.detach().clamp(max=1 + clip_high)
    metrics = {"clip_fraction_high": ratio > 1 + clip_high}
    return -weight * batch["advantages"] * out["logprobs"], metrics | _policy_metrics(out, batch, ratio)


@loss(outputs=("logprobs", "entropy"), reads=("advantages",))
def sapo(
    out: Outputs,
    batch: Batch,
    *,
    tau_positive: Annotated[float, Field(gt=0)] = 1.0,
    tau_negative: Annotated[float, Field(gt=0)] = 1.05,
) -> tuple[Tensor, Metrics]:
    """-(4 / τ) σ(τ (ρ - 1)) A per token [T], τ by the sign of A: a gate that closes slowly in place of a clip.

    Source: arXiv:2511.20347, section 3.
    """
    ratio, advantages = _log_ratio(out, batch).exp(), batch["advantages"]
    tau = torch.where(advantages > 0, tau_positive, tau_negative)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages, _policy_metrics(out, batch, ratio)


@loss(outputs=("logprobs", "entropy"), reads=("advantages",))
def reinforce(out: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
    """-A log p per token [T]. Source: Williams 1992; arXiv:2402.14740."""
    return -batch["advantages"] * out["logprobs"], _policy_metrics(out, batch, _log_ratio(out, batch).exp())


@loss(reads=("ref_logprobs",))
def kl(
    out: Outputs, batch: Batch, *, type: Literal["k2", "k3", "low_var_kl"] = "k3", unbiased: bool = False
) -> tuple[Tensor, Metrics]:
    """Estimated KL divergence from the reference per token [T]; k1 has no useful gradient and is left out.

    `unbiased` multiplies by ρ = policy / old policy, the policy that sampled (DeepSeek-V3.2, arXiv:2512.02556).
    """
    values = kl_estimate(out["logprobs"], batch["ref_logprobs"], type)
    weighed = values * _log_ratio(out, batch).exp() if unbiased else values
    return weighed, {"kl": values.detach()}


@loss(outputs=("entropy",))
def entropy_bonus(out: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
    """Minus the entropy per token [T], in nats."""
    return -out["entropy"], {}


def _clipped(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Metrics]:
    """The clipped surrogate and how much was clipped, [T] each."""
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    values = torch.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip is not None:
        values = torch.where(advantages < 0, torch.minimum(values, -dual_clip * advantages), values)
    return values, {
        "clip_fraction_low": (ratio < 1 - clip_low) & (advantages < 0),
        "clip_fraction_high": (ratio > 1 + clip_high) & (advantages > 0),
    }


def _log_ratio(out: Outputs, batch: Batch) -> Tensor:
    """[T] log of policy / old policy."""
    return out["logprobs"] - old_logprobs(out, batch)


def old_logprobs(out: Outputs, batch: Batch) -> Tensor:
    """[T] of the policy before this update: a batch without that column is trained on by the policy that it is of."""
    return batch["old_logprobs"] if "old_logprobs" in batch else out["logprobs"].detach()


def _policy_metrics(out: Outputs, batch: Batch, ratio: Tensor) -> Metrics:
    """What every policy loss reports, [T] each."""
    old, logprobs = old_logprobs(out, batch), out["logprobs"].detach()
    metrics = {
        "ppo_kl": old - logprobs,
        "importance_weight": ratio.detach(),
        "importance_weight_max": ratio.detach(),
        "entropy": out["entropy"].detach(),
    }
    if "sampler_logprobs" in batch:
        difference = (old - batch["sampler_logprobs"]).abs()
        metrics |= {"train_rollout_logprob_abs_diff": difference, "train_rollout_logprob_abs_diff_max": difference}
    if "kl_penalties" in batch:
        kl = kl_estimate(logprobs, batch["ref_logprobs"], "k3")
        metrics |= {"kl": kl, "kl_penalty": batch["kl_penalties"]}
    if "teacher_logprobs" in batch:
        metrics["teacher_kl"] = old - batch["teacher_logprobs"]
    return metrics
