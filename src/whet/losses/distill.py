"""Distillation: how far the student's distribution over the next token is from a teacher's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from whet.batch import Batch
from whet.losses.base import Metrics, Outputs, loss
from whet.losses.reference_free import log1mexp

IMPOSSIBLE = -1e4
"""Stands for the logarithm of zero, where a teacher gives a word no probability at all."""

Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Divergence:
    """A request: the divergence [T] of the student from the teacher whose hidden states the batch carries."""

    beta: float
    temperature: float
    name: str = "divergence"


@dataclass(frozen=True)
class TopK:
    """A request: the student's logprobs [T, k] at this temperature of the words in column `teacher_topk_ids`."""

    temperature: float
    name: str = "topk_logprobs"


def _divergence(options: Mapping[str, Any]) -> tuple[Divergence, ...]:
    return (Divergence(float(options["beta"]), float(options["temperature"])),)


def _top_k(options: Mapping[str, Any]) -> tuple[TopK, ...]:
    return (TopK(float(options["temperature"])),)


@loss(outputs=("logprobs", "correct"), requests=_divergence, reads=("teacher_hidden",))
def gkd(
    out: Outputs, batch: Batch, *, beta: Share = 0.5, temperature: Temperature = 1.0, hard: Share = 0.0
) -> tuple[Tensor, Metrics]:
    """Generalised Jensen-Shannon divergence from the teacher's distribution per token [T], in nats.

    `beta` 0 is forward KL(teacher || student), 1 reverse KL(student || teacher); between them it is
    beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S, at 0.5 the Jensen-Shannon divergence
    (where a text says that beta 1 is, it is mistaken). `temperature` divides the logits of both models; it is not
    the one that completions are sampled at, and the result is not multiplied by its square, as in TRL. `hard` is
    the share of the cross-entropy of the data's own token, at temperature 1, in the mixture.
    Sources: arXiv:2306.13649, eq. 1; soft and hard targets arXiv:1503.02531.
    """
    (request,) = _divergence({"beta": beta, "temperature": temperature})
    return _mixed(out, out[request], hard)


@loss(outputs=("logprobs", "correct"), requests=_top_k, reads=("teacher_topk_ids", "teacher_topk_logprobs"))
def gkd_topk(
    out: Outputs, batch: Batch, *, beta: Share = 0.5, temperature: Temperature = 1.0, hard: Share = 0.0
) -> tuple[Tensor, Metrics]:
    """`gkd` from the teacher's k likeliest words per token, with all other words as one outcome [T].

    Merging words never raises a divergence: it is a lower bound of `gkd`, and equal where k is the vocabulary. The
    columns are of the distillation's `temperature`; the order of the words does not matter.
    Source: arXiv:2306.13649, eq. 1.
    """
    (request,) = _top_k({"temperature": temperature})
    trained = batch.loss_mask
    student, teacher = out[request][trained], batch["teacher_topk_logprobs"][trained].clamp(min=IMPOSSIBLE)
    values = divergence(_with_rest(student), _with_rest(teacher), beta)
    return _mixed(out, torch.zeros_like(out["logprobs"]).masked_scatter(trained, values), hard)


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The generalised Jensen-Shannon divergence [M] of log-probabilities [M, k] whose exponentials sum to one."""
    if beta == 0:
        return (teacher.exp() * (teacher - student)).sum(-1)
    if beta == 1:
        return (student.exp() * (student - teacher)).sum(-1)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    from_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    return beta * from_teacher + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)


def _with_rest(logprobs: Tensor) -> Tensor:
    """[M, k] -> [M, k + 1]: with the logarithm of what the k probabilities leave of one (at least float32's eps)."""
    return torch.cat([logprobs, log1mexp(logprobs.logsumexp(-1, keepdim=True))], -1)


def _mixed(out: Outputs, soft: Tensor, hard: float) -> tuple[Tensor, Metrics]:
    cross_entropy = -out["logprobs"]
    metrics = {
        "divergence": soft.detach(),
        "cross_entropy": cross_entropy.detach(),
        "mean_token_accuracy": out["correct"],
    }
    # Without a share of it the cross-entropy is only reported: no gradient is to pass through it.
    return (1 - hard) * soft + hard * cross_entropy if hard else soft, metrics
