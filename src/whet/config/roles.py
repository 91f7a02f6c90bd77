"""Settings of the frozen models beside the policy: the reference, and the teacher of distillation."""

from typing import Literal

from pydantic import Field

from whet.config.base import Config
from whet.config.model import QuantizationConfig


class ReferenceConfig(Config):
    """The frozen model that the policy is held against.

    It is the policy as it was before training: under a new adapter the policy with its adapter off, which takes no
    memory; otherwise a second copy of the weights.
    """

    path: str | None = None
    """Folder or hub name of another model to be the reference."""
    precompute: bool = False
    """Compute the reference's logprobs of all rows before the first step, keep them on disk by content, and do
    without the reference during training."""
    sync_steps: int | None = Field(default=None, ge=1)
    """Move the reference towards the policy every N optimizer steps (TR-DPO, arXiv:2404.09656, uses 512)."""
    sync_alpha: float = Field(default=0.6, gt=0, le=1)
    """Share of the policy in the moved reference."""


class DistillConfig(Config):
    """Where the teacher is and whose completions are learned from."""

    teacher: str | None = None
    """Folder or hub name of the teacher; its vocabulary must be the policy's."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the teacher's weights; `model.dtype` when not given."""
    quantization: QuantizationConfig | None = None
    """Load the teacher quantised."""
    lmbda: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps that train on completions sampled from the policy: 0 is supervised distillation,
    1 fully on-policy. The default is 0.5 for `gkd` and 0 for `distill`. Sampling is set under `rollout`."""
    seq_kd: bool = False
    """The other steps train on completions sampled from the teacher, in place of those of the rows."""
    top_k: int | None = Field(default=None, ge=1)
    """Keep of the teacher's distribution the k likeliest tokens and the mass of the rest. Of rows they are computed
    once, before the first step, and kept on disk; the teacher is then not needed during training."""
