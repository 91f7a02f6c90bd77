"""Losses of reward models."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from whet.batch import Batch
from whet.losses.base import Metrics, Outputs, loss


@loss(outputs=("scores",), per="pair")
def bradley_terry(
    out: Outputs, batch: Batch, *, centering: Annotated[float, Field(ge=0)] = 0.0
) -> tuple[Tensor, Metrics]:
    """-log σ(s_w - s_r) + centering (s_w + s_r)² per pair [U]; each unit holds chosen, then rejected.

    Sources: arXiv:2203.02155; centering arXiv:2312.09244.
    """
    chosen, rejected = out["scores"][0::2], out["scores"][1::2]
    values = -F.logsigmoid(chosen - rejected) + centering * (chosen + rejected) ** 2
    return values, {"accuracy": (chosen > rejected).float(), "margin": (chosen - rejected).detach()}
