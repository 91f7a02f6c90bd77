"""The critic's loss."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from whet.batch import Batch
from whet.losses.base import Metrics, Outputs, loss


@loss(outputs=("values",), reads=("returns", "values"))
def value(out: Outputs, batch: Batch, *, clip: Annotated[float, Field(gt=0)] = 0.2) -> tuple[Tensor, Metrics]:
    """½ max((v - R)², (clip(v, v_old ± clip) - R)²) per token [T]. Source: arXiv:1707.06347 and its code."""
    values, old, returns = out["values"], batch["values"], batch["returns"]
    clipped = torch.clamp(values, old - clip, old + clip)
    losses = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    metrics = {"value": values.detach(), "return": returns, "value_error": (values.detach() - returns).abs()}
    return losses, {**metrics, "value_clip_fraction": ((values - old).abs() > clip).float()}
