"""Credit from a teacher: on-policy distillation as reinforcement learning."""

from __future__ import annotations

import torch

from whet.batch import Batch
from whet.credit.base import credit


@credit(reads=("old_logprobs", "teacher_logprobs"))
def opd(batch: Batch, *, coef: float = 1.0) -> Batch:
    """-coef (log p of the policy - log p of the teacher) per trained token [T], added to advantages that are there.

    Sources: MiniLLM, arXiv:2306.08543; Lu et al. 2025, On-policy distillation.
    """
    gap = batch["old_logprobs"] - batch["teacher_logprobs"]
    advantages = torch.where(batch.loss_mask, -coef * gap, 0.0)
    return batch.with_columns(advantages=batch["advantages"] + advantages if "advantages" in batch else advantages)
