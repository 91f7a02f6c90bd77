"""Pairs: chosen completions against rejected ones, and the options that losses comparing them to a reference share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from inspect import Parameter
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, ValidationInfo
from torch import Tensor

from whet.batch import Batch
from whet.losses.base import Loss, Metrics, Outputs, loss

Beta = Annotated[float, Field(gt=0)]
"""How strongly a loss answers to a log-ratio; a reward is β times it."""
Smoothing = Annotated[float, Field(ge=0, le=0.5)]
"""Share of the pairs that is taken to be labelled the wrong way round."""
FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

MAX_EXPONENT = 40.0
"""Log-ratios are bounded by this before they are exponentiated: e^40 squared is still a float32."""


def chosen_rejected(values: Tensor) -> tuple[Tensor, Tensor]:
    """[N] -> [U], [U]: each unit holds the chosen completion, then the rejected one."""
    return values[0::2], values[1::2]


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - ε) log σ(x) - ε log σ(-x), elementwise."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def pair_metrics(rewards: Tensor, logps: Tensor) -> Metrics:
    """What every preference loss reports, [U] each, from the rewards and logprobs [N] of both completions."""
    (chosen, rejected), (logps_chosen, logps_rejected) = (chosen_rejected(x.detach()) for x in (rewards, logps))
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": logps_chosen,
        "logps/rejected": logps_rejected,
    }


@dataclass(frozen=True)
class Pairs:
    """U pairs seen against a reference, float32.

    logps, ratios, scores: [N] logprobs L summed over each completion, their log-ratios Δ = L - L_ref, and what
    the divergence from the reference makes of those (reverse KL: Δ itself).
    """

    batch: Batch
    logps: Tensor
    ratios: Tensor
    scores: Tensor

    @property
    def chosen(self) -> Tensor:
        """[U] log-ratios Δ of the chosen completions."""
        return self.ratios[0::2]

    @property
    def rejected(self) -> Tensor:
        """[U] log-ratios Δ of the rejected completions."""
        return self.ratios[1::2]

    @property
    def difference(self) -> Tensor:
        """[U] by how much the chosen completion's score is ahead."""
        chosen, rejected = chosen_rejected(self.scores)
        return chosen - rejected

    @property
    def mean_difference(self) -> Tensor:
        """[U] the same with each score divided by its completion's trained tokens."""
        chosen, rejected = chosen_rejected(self.scores / self.batch.num_trained.clamp(min=1))
        return chosen - rejected


def compare(logprobs: Tensor, ref_logprobs: Tensor, batch: Batch, ld_alpha: float = 1.0) -> Pairs:
    """Pairs from logprobs [T]; tokens beyond the length of the pair's shorter completion count `ld_alpha`.

    Source of the length desensitisation: LD-DPO, arXiv:2409.06411.
    """
    logprobs, ref_logprobs = logprobs.float(), ref_logprobs.float()
    ratios = logprobs - ref_logprobs
    if ld_alpha != 1:
        counted = torch.where(_within_shorter(batch), 1.0, ld_alpha)
        logprobs, ratios = logprobs * counted, ratios * counted
    ratios = batch.sum_tokens(ratios)
    return Pairs(batch, batch.sum_tokens(logprobs), ratios, scores=ratios)


def _within_shorter(batch: Batch) -> Tensor:
    """[T] whether a trained token is among the first n of its completion, n trained tokens of the pair's shorter."""
    trained = batch.num_trained
    before = trained.cumsum(0) - trained
    place = batch.loss_mask.cumsum(0) - before[batch.sequence_ids]
    shorter = trained.view(-1, 2).amin(1).repeat_interleave(2)
    return place <= shorter[batch.sequence_ids]


def divergence_scores(ratios: Tensor, f_divergence: FDivergence, f_alpha: float | None = None) -> Tensor:
    """f'(t) of log-ratios log t, elementwise: what takes the place of Δ when the divergence is not reverse KL.

    reverse_kl: log t. forward_kl: 1 - 1/t. js: log(2t / (t + 1)). alpha: (t^(α-1) - 1) / (α - 1), which is forward
    KL at α = 0 and reverse KL at α = 1 (the paper's α is our 1 - α); `f_alpha` is 0.5 where it is None.
    Source: arXiv:2309.16240.
    """
    if f_divergence == "js":
        return math.log(2) + F.logsigmoid(ratios)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": (0.5 if f_alpha is None else f_alpha) - 1}[f_divergence]
    return ratios if power == 0 else torch.expm1((power * ratios).clamp(max=MAX_EXPONENT)) / power


def on_policy_weights(out: Outputs, batch: Batch) -> Tensor:
    """[U] how likely the policy would have written both completions of a pair itself; no gradient.

    A token's probability is measured against Σ p², what a token drawn from the policy has on average.
    Source: WPO, arXiv:2406.11827, eq. 2.
    """
    aligned = out["logprobs"].detach().float() - out["log_sum_sq_probs"].detach().float()
    chosen, rejected = chosen_rejected(batch.mean_tokens(aligned))
    return (chosen + rejected).exp()


def _goes_with_alpha(value: float | None, info: ValidationInfo) -> float | None:
    divergence = info.data.get("f_divergence", "alpha")  # absent when it is wrong itself
    if value is not None and divergence != "alpha":
        raise ValueError(f"only f_divergence: alpha has a coefficient, but f_divergence is {divergence!r}")
    return value


def _option(name: str, type: Any, default: object) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=type)


LD_ALPHA = _option("ld_alpha", Annotated[float, Field(ge=0, le=1)], 1.0)
WPO = _option("wpo", bool, False)
F_DIVERGENCE = _option("f_divergence", FDivergence, "reverse_kl")
F_ALPHA = _option("f_alpha", Annotated[float | None, AfterValidator(_goes_with_alpha)], None)

Formula = Callable[..., Tensor]
"""(pairs, *, beta, further options) -> values [U]."""


def pair_loss(*, reads: Sequence[str] = (), wpo: bool = True, f_divergence: bool = False) -> Callable[[Formula], Loss]:
    """Make a loss of a formula over `Pairs`, with the options that it shares with the others of its kind.

    All have `ld_alpha`, the weight of tokens beyond the length of the pair's shorter completion (see `compare`).
    With `wpo` the loss has an option of that name, which weighs pairs by `on_policy_weights`. With `f_divergence`
    it has that and `f_alpha` (see `divergence_scores`); the formula then reads scores, not log-ratios.
    """
    shared = [LD_ALPHA, *([WPO] if wpo else []), *([F_DIVERGENCE, F_ALPHA] if f_divergence else [])]
    positional = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("out", "batch")]

    def declare(formula: Formula) -> Loss:
        own = list(inspect.signature(formula).parameters.values())[1:]
        signature = inspect.Signature([*positional, *own, *shared])

        @wraps(formula)
        def compute(out: Outputs, batch: Batch, **options: Any) -> tuple[Tensor, Metrics]:
            given = signature.bind(out, batch, **options)
            given.apply_defaults()
            option = given.arguments
            pairs = compare(out["logprobs"], batch["ref_logprobs"], batch, option["ld_alpha"])
            if f_divergence:
                scores = divergence_scores(pairs.ratios, option["f_divergence"], option["f_alpha"])
                pairs = replace(pairs, scores=scores)
            values = formula(pairs, **{one.name: option[one.name] for one in own})
            if option.get("wpo"):
                values = values * on_policy_weights(out, batch)
            return values, pair_metrics(option["beta"] * pairs.ratios, pairs.logps)

        compute.__signature__ = signature  # type: ignore[attr-defined]
        needs = {"wpo": ("log_sum_sq_probs",)} if wpo else {}
        return loss(outputs_if=needs, reads=("ref_logprobs", *reads), per="pair")(compute)

    return declare
