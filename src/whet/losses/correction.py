"""Off-policy correction between engine and trainer: policy losses weighed by how likely each side finds a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from whet.batch import Batch
from whet.losses.base import Loss, Metrics, Outputs
from whet.losses.policy import old_logprobs

Level = Literal["token", "sequence", "geometric"]
Kind = Literal["tis", "icepop", "mis"]


@dataclass(frozen=True)
class Correction:
    """What is done about u = exp(old_logprob - sampler_logprob), per token, or per sequence as product or mean.

    `kind`: `tis` bounds u to [low, high]; `icepop` and `mis` multiply by u inside of it and by 0 outside. `veto`
    leaves out sequences with a token whose u is below it. `opsm` leaves out tokens with A < 0 in sequences whose mean
    of old - new logprobs is above it.
    Sources: TIS, Yao et al. 2025, Your efficient RL framework secretly brings you off-policy RL training; IcePop,
    arXiv:2510.18855; MIS and veto, Liu et al. 2025, When speed kills stability; OPSM, arXiv:2512.02556, section 3.1.
    """

    kind: Kind | None
    level: Level
    low: float
    high: float
    veto: float | None = None
    opsm: float | None = None

    @property
    def reads(self) -> frozenset[str]:
        """Columns that it needs."""
        sampler = {"sampler_logprobs"} if self.kind is not None or self.veto is not None else set()
        return frozenset(sampler | ({"advantages"} if self.opsm is not None else set()))

    def weights(self, out: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """[T] factors of a policy loss, without gradient, and what is to be reported of them."""
        old = old_logprobs(out, batch)
        weights, metrics = torch.ones_like(old), {}
        if self.kind is not None:
            u = self._ratio(old - batch["sampler_logprobs"], batch)
            outside = (u < self.low) | (u > self.high)
            bounded = u.clamp(self.low, self.high) if self.kind == "tis" else torch.where(outside, 0.0, u)
            weights = weights * bounded
            metrics |= {"correction_weight": u, "correction_weight_max": u, "correction_clipped": outside}
        if self.veto is not None:
            vetoed = (old - batch["sampler_logprobs"]).exp() < self.veto
            vetoed = batch.sum_tokens(vetoed.float())[batch.sequence_ids] > 0
            weights, metrics["correction_vetoed"] = torch.where(vetoed, 0.0, weights), vetoed
        if self.opsm is not None:
            drift = batch.mean_tokens(old - out["logprobs"].detach())[batch.sequence_ids]
            dropped = (drift > self.opsm) & (batch["advantages"] < 0)
            weights, metrics["opsm_dropped"] = torch.where(dropped, 0.0, weights), dropped
        return weights, metrics

    def _ratio(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        """[T] u at its level, the same on all tokens of a sequence but for `token`."""
        if self.level == "token":
            return log_ratio.exp()
        total = batch.sum_tokens if self.level == "sequence" else batch.mean_tokens
        return total(log_ratio).exp()[batch.sequence_ids]


class Corrected:
    """A policy loss with one value per token, weighed by a correction. Implements `Loss`."""

    def __init__(self, inner: Loss, correction: Correction) -> None:
        assert inner.per == "token", "a correction weighs tokens"
        self.inner, self.correction = inner, correction
        self.outputs = inner.outputs | {"logprobs"}
        self.outputs_if, self.requests, self.per = inner.outputs_if, inner.requests, inner.per
        self.reads = inner.reads | correction.reads

    def __call__(self, out: Outputs, batch: Batch, **options) -> tuple[Tensor, Metrics]:
        values, metrics = self.inner(out, batch, **options)
        weights, more = self.correction.weights(out, batch)
        return values * weights, metrics | more
