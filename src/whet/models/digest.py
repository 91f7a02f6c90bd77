"""A model's content in one number, so that what it computed can be kept and found again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from whet.models.parts import base


@torch.no_grad()
def digest(model: nn.Module, weights: Iterable[tuple[str, Tensor]] | None = None) -> str:
    """A hash of configuration and weights, those of an adapter left out: that of the model with its adapter off.

    `weights` are those of the whole model where this process holds only a part of them.
    """
    inner = base(model)
    result = hashlib.blake2b(inner.config.to_json_string(use_diff=True).encode(), digest_size=16)
    for name, tensor in weights if weights is not None else sorted(inner.state_dict().items()):
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        # Named as without an adapter, so that full training and an adapter find each other's results.
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".").removeprefix("base_model.model.")
        result.update(f"{plain} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return result.hexdigest()
