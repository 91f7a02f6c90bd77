"""AdamW over the trainable weights, and the learning rate over time."""

from __future__ import annotations

import math

import torch
from torch import nn

from whet.config.optim import OptimConfig
from whet.errors import ConfigError


def adamw(model: nn.Module, config: OptimConfig, *, beside: nn.Module | None = None) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, over a model and a head `beside` it.

    Raises ConfigError when nothing is trainable.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if beside is not None:
        trainable += beside.parameters()
    if not trainable:
        raise ConfigError("no weight is trainable; loosen model.freeze or choose an adapter")
    # A fused step takes tensors that are divided over the same ranks.
    meshes = dict.fromkeys(getattr(p, "device_mesh", None) for p in trainable)
    groups = [
        {"params": params, "weight_decay": config.weight_decay if decays else 0.0}
        for mesh in meshes
        for decays in (True, False)
        if (params := [p for p in trainable if (p.dim() >= 2) == decays and getattr(p, "device_mesh", None) == mesh])
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """The rate of optimizer step `step` (from 0) of `total`: linear warm-up, then the schedule."""
    warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape[config.schedule])
