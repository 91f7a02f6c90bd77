"""Settings of the training backend: device, precision, memory."""

from typing import Literal

from pydantic import Field

from whet.config.base import Config


class BackendConfig(Config):
    """Where and in which precision the model is trained."""

    use: str = "local"
    """`local`, or `package.module:Class` of your own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward and backward pass; weights and optimizer keep `model.dtype`. `auto` is
    bf16 on a GPU and float32 on a CPU. fp16 scales the loss and needs a GPU."""
    matmul: Literal["auto", "highest", "high", "medium"] = "auto"
    """Precision of float32 matrix products. `auto` is `highest`. `high` allows TF32 on a GPU;
    `medium` pays on some CPUs where batches have always the same shape."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 leaves PyTorch's choice."""
    max_tokens_per_device: int = Field(default=8192, ge=1)
    """Most tokens in one micro-batch, counting shared prefixes once. A longer unit is a micro-batch of
    its own."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Most units in one micro-batch, on top of `max_tokens_per_device`."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory, in gigabytes, that the estimate before training is held against; what is free when not given. It sets
    no limit to the run itself."""
    head_chunk_mb: int = Field(default=128, ge=1)
    """Most memory, in MiB, for the logits of one chunk of the language-model head."""
