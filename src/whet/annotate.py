"""Annotations: columns of a batch that models compute without gradient before the losses see it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from whet.batch import Batch, collate
from whet.losses.base import Output
from whet.losses.transport import aot_partners
from whet.tensor.kl import KLType, kl_estimate
from whet.types import Sample, Unit

Running = MutableMapping[str, list[float]]
"""Running means by name, as [how many, mean]; part of a run's saved progress."""


class Model(Protocol):
    """What an annotation needs of a model: outputs over a batch, without gradient."""

    def forward(self, batch: Batch, outputs: Set[Output]) -> dict[Any, Tensor]: ...


@runtime_checkable
class Annotation(Protocol):
    """Writes columns of the global batch."""

    @property
    def roles(self) -> frozenset[str]:
        """Models that it runs."""
        ...

    @property
    def writes(self) -> frozenset[str]:
        """Columns that it adds."""
        ...

    def __call__(self, batch: Batch, models: Mapping[str, Model], running: Running) -> Batch: ...


@dataclass(frozen=True)
class Annotate:
    """Writes output `output` of the model in `role` to `column`, unless the rows brought it along."""

    role: str
    output: str
    column: str

    @property
    def roles(self) -> frozenset[str]:
        return frozenset({self.role})

    @property
    def writes(self) -> frozenset[str]:
        return frozenset({self.column})

    def __call__(self, batch: Batch, models: Mapping[str, Model], running: Running) -> Batch:
        if self.column in batch:
            return batch
        return batch.with_columns(**{self.column: models[self.role].forward(batch, {self.output})[self.output]})


@dataclass(frozen=True)
class SamplerAsOld:
    """Writes the logprobs of the engine that sampled to `old_logprobs`."""

    roles: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset({"old_logprobs"})

    def __call__(self, batch: Batch, models: Mapping[str, Model], running: Running) -> Batch:
        return batch.with_columns(old_logprobs=batch["sampler_logprobs"])


@dataclass(frozen=True)
class Top:
    """A request to a backend: `top_ids` and `top_logprobs` [T, k], the likeliest tokens at this temperature."""

    k: int
    temperature: float
    name: str = "top"


@dataclass(frozen=True)
class TeacherTopK:
    """Writes the teacher's `k` likeliest tokens in the place of each trained token, and their logprobs."""

    k: int
    temperature: float
    roles: frozenset[str] = frozenset({"teacher"})
    writes: frozenset[str] = frozenset({"teacher_topk_ids", "teacher_topk_logprobs"})

    def __call__(self, batch: Batch, models: Mapping[str, Model], running: Running) -> Batch:
        if self.writes <= batch.columns.keys():
            return batch
        out = models["teacher"].forward(batch, {Top(self.k, self.temperature)})
        return batch.with_columns(teacher_topk_ids=out["top_ids"].long(), teacher_topk_logprobs=out["top_logprobs"])


@dataclass(frozen=True)
class KLBaseline:
    """Writes `kl_baseline`: max(0, mean over the global batch of L - L_ref of completions under other prompts).

    Prompts and completions are matched anew by a derangement: completion i goes with the next prompt in the batch.
    With a single row there is no other prompt, and the baseline is 0. Where the reference has not been run on the
    batch before, it is now, on both completions of each prompt together, and `ref_logprobs` is written as well.
    Source: KTO, arXiv:2402.01306, section 4.1.
    """

    roles: frozenset[str] = frozenset({"policy", "reference"})
    writes: frozenset[str] = frozenset({"kl_baseline"})

    def __call__(self, batch: Batch, models: Mapping[str, Model], running: Running) -> Batch:
        baseline = torch.zeros(())
        if batch.num_sequences > 1:
            own, other = _samples(batch), mismatched(batch)
            elsewhere = collate([Unit(f"mismatched/{i}", (sample,)) for i, sample in enumerate(other)])
            policy = models["policy"].forward(elsewhere, {"logprobs"})["logprobs"]
            if "ref_logprobs" in batch:
                reference = models["reference"].forward(elsewhere, {"logprobs"})["logprobs"]
            else:
                logprobs, reference = _side_by_side(own, other, models["reference"])
                batch = batch.with_columns(ref_logprobs=logprobs.to(batch.tokens.device))
            baseline = elsewhere.sum_tokens(policy - reference).mean().clamp(min=0)
        return batch.with_columns(kl_baseline=baseline.to(batch.tokens.device).repeat(batch.num_sequences))


def _side_by_side(own: Sequence[Sample], other: Sequence[Sample], model: Model) -> tuple[Tensor, Tensor]:
    """Logprobs [T] of the samples of both lists; where the model can, the prompt that two of them share runs once."""
    units = [Unit(f"both/{i}", pair) for i, pair in enumerate(zip(own, other, strict=True))]
    both = collate(units, share_prefixes=getattr(model, "shares_prefixes", True))
    logprobs = model.forward(both, {"logprobs"})["logprobs"]
    first = both.sequence_ids % 2 == 0
    return logprobs[first], logprobs[~first]


def mismatched(batch: Batch) -> list[Sample]:
    """Each prompt of the batch with the completion of the sequence before it (the first with the last one's).

    A prompt is what stands before the first trained token; a completion is the rest, with its mask.
    """
    assert batch.num_sequences > 1, "a single row has no other to be mismatched with"
    rows = _samples(batch)
    begins = [row.loss_mask.index(True) if True in row.loss_mask else len(row.tokens) for row in rows]
    samples = []
    for i, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        other, at = rows[i - 1], begins[i - 1]
        mask = [False] * begin + [*other.loss_mask[at:]]
        samples.append(Sample([*row.tokens[:begin], *other.tokens[at:]], mask))
    return samples


def _samples(batch: Batch) -> list[Sample]:
    """The sequences of a batch without their columns."""
    tokens, mask = batch.tokens.tolist(), batch.loss_mask.tolist()
    return [Sample(tokens[a:b], mask[a:b]) for a, b in pairwise(batch.cu_seqlens.tolist())]


@dataclass(frozen=True)
class RewardMean:
    """Writes `reward_mean`: the mean of the rewards βΔ of all rows of earlier steps, 0 in the first.

    Source: BCO, arXiv:2404.04656, section 3.3.
    """

    roles: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset({"reward_mean"})

    def __call__(self, batch: Batch, models: Mapping[str, Model], running: Running) -> Batch:
        mean = running.get("reward_mean", [0, 0.0])[1]
        return batch.with_columns(reward_mean=torch.full((batch.num_sequences,), mean, device=batch.tokens.device))

    def observe(self, batch: Batch, metrics: Mapping[str, float], running: Running) -> None:
        """Take in the rewards that an update has reported."""
        chosen = float((batch["labels"] == 1).float().mean())
        mean = chosen * metrics.get("rewards/chosen", 0.0) + (1 - chosen) * metrics.get("rewards/rejected", 0.0)
        count, before = running.get("reward_mean", [0, 0.0])
        seen = count + batch.num_sequences
        running["reward_mean"] = [seen, before + (mean - before) * batch.num_sequences / seen]


@dataclass(frozen=True)
class AotPartners:
    """Writes which log-ratios meet when each side of the global batch is sorted; `ld_alpha` as the loss has it."""

    ld_alpha: float = 1.0
    roles: frozenset[str] = frozenset({"policy"})
    writes: frozenset[str] = frozenset({"aot_reference", "aot_rejected", "aot_chosen"})

    def __call__(self, batch: Batch, models: Mapping[str, Model], running: Running) -> Batch:
        logprobs = models["policy"].forward(batch, {"logprobs"})["logprobs"]
        return batch.with_columns(**aot_partners(logprobs, batch, ld_alpha=self.ld_alpha))


@dataclass(frozen=True)
class KLPenalty:
    """Writes `kl_penalties`: `coef` times the estimated divergence from the reference, of `old_logprobs`."""

    coef: float
    type: KLType
    roles: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset({"kl_penalties"})

    def __call__(self, batch: Batch, models: Mapping[str, Model], running: Running) -> Batch:
        penalties = self.coef * kl_estimate(batch["old_logprobs"], batch["ref_logprobs"], self.type)
        return batch.with_columns(kl_penalties=torch.where(batch.loss_mask, penalties, 0.0))
