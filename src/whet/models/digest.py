"""A model's content in one number, so that what it computed can be kept and found again."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from whet.models.parts import base


@torch.no_grad()
def digest(model: nn.Module) -> str:
    """A hash of configuration and weights, those of an adapter left out: that of the model with its adapter off."""
    inner = base(model)
    result = hashlib.blake2b(inner.config.to_json_string(use_diff=True).encode(), digest_size=16)
    for name, tensor in sorted(inner.state_dict().items()):
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        # Named as without an adapter, so that full training and an adapter find each other's results.
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        result.update(f"{plain} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return result.hexdigest()
