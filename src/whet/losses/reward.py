"""Losses of reward models."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.batch import Batch
from whet.losses.base import Metrics, Outputs, loss


@loss(outputs=("scores",), per="pair")
def bradley_terry(
    out: Outputs, batch: Batch, *, centering: Annotated[float, Field(ge=0)] = 0.0
) -> tuple[Tensor, Metrics]:
    """-log σ(s_w - s_r - margin) + centering (s_w + s_r)² per pair [U]; each unit holds chosen, then rejected.

    Data may say by how much the chosen completion is better, in the column `margins`; without it the margin
    is 0. Sources: arXiv:2203.02155; margin arXiv:2307.09288, eq. 2; centering arXiv:2312.09244 (0.01 is usual).
    """
    scores = out["scores"].float()
    chosen, rejected = scores[0::2], scores[1::2]
    ahead = chosen - rejected
    if "margins" in batch:
        ahead = ahead - batch["margins"]
    values = -F.logsigmoid(ahead) + centering * (chosen + rejected).square()
    return values, _metrics(chosen.detach(), rejected.detach())


def _metrics(chosen: Tensor, rejected: Tensor) -> Metrics:
    """[U] each; the smallest and largest score of a step are reduced from those of its pairs."""
    return {
        "accuracy": (chosen > rejected).float(),
        "margin": chosen - rejected,
        "min_reward": torch.minimum(chosen, rejected),
        "mean_reward": (chosen + rejected) / 2,
        "max_reward": torch.maximum(chosen, rejected),
    }
