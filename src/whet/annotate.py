"""Annotations: columns of a batch that models compute without gradient before the losses see it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Set
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from whet.batch import Batch, collate
from whet.losses.transport import aot_partners
from whet.types import Sample, Unit

Running = MutableMapping[str, list[float]]
"""Running means by name, as [how many, mean]; part of a run's saved progress."""


class Model(Protocol):
    """What an annotation needs of a model: outputs over a batch, without gradient."""

    def forward(self, batch: Batch, outputs: Set[str]) -> dict[str, Tensor]: ...


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
    With a single row there is no other prompt, and the baseline is 0. Source: KTO, arXiv:2402.01306, section 4.1.
    """

    roles: frozenset[str] = frozenset({"policy", "reference"})
    writes: frozenset[str] = frozenset({"kl_baseline"})

    def __call__(self, batch: Batch, models: Mapping[str, Model], running: Running) -> Batch:
        baseline = torch.zeros(())
        if batch.num_sequences > 1:
            mismatched = mismatch(batch)
            sums = [
                mismatched.sum_tokens(models[role].forward(mismatched, {"logprobs"})["logprobs"])
                for role in ("policy", "reference")
            ]
            baseline = (sums[0] - sums[1]).mean().clamp(min=0)
        return batch.with_columns(kl_baseline=baseline.to(batch.tokens.device).repeat(batch.num_sequences))


def mismatch(batch: Batch) -> Batch:
    """Each prompt of the batch with the completion of the sequence before it (the first with the last one's).

    A prompt is what stands before the first trained token; a completion is the rest, with its mask.
    """
    assert batch.num_sequences > 1, "a single row has no other to be mismatched with"
    rows = torch.tensor_split(batch.tokens, batch.cu_seqlens[1:-1].tolist())
    masks = torch.tensor_split(batch.loss_mask, batch.cu_seqlens[1:-1].tolist())
    begins = [int(mask.int().argmax()) if mask.any() else len(mask) for mask in masks]
    units = []
    for i, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        other = i - 1
        tokens = torch.cat([row[:begin], rows[other][begins[other] :]])
        mask = torch.cat([torch.zeros(begin, dtype=torch.bool), masks[other][begins[other] :].cpu()])
        units.append(Unit(f"mismatched/{i}", (Sample(tokens.cpu().numpy(), mask.numpy()),)))
    return collate(units)


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
