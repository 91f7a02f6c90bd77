"""Settings of the optimizer and of the learning rate over time."""

from typing import Literal

from pydantic import Field

from whet.config.base import Config


class OptimConfig(Config):
    """AdamW (arXiv:1711.05101) with warm-up, schedule and gradient clipping."""

    lr: float = Field(default=2e-5, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay, on matrices only: biases and norms are not decayed."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the gradient's global norm to this; 0 turns clipping off."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay after warm-up."""
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of all steps over which the rate rises from 0 to `lr`."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of warm-up; takes precedence over `warmup_ratio`."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """The schedule ends at `lr` times this."""
