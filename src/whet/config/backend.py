"""Settings of the training backend: device, precision, memory."""

from typing import Literal

from pydantic import Field

from whet.config.base import Config


class BackendConfig(Config):
    """Where and in which precision the model is trained."""

    use: str = "local"
    """`local` (one process), `fsdp` (PyTorch's own sharding, with tensor, context and expert parallelism), `deepspeed`
    (ZeRO), `megatron` (Megatron-Core), or `package.module:Class` of your own."""
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
    """Most tokens in one micro-batch, counting shared prefixes once. A group that is longer is cut between its
    completions; a pair, or a single row, that is longer is a micro-batch of its own."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Most units in one micro-batch, on top of `max_tokens_per_device`."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory, in gigabytes, that the estimate before training is held against; what is free when not given. It sets
    no limit to the run itself."""
    head_chunk_mb: int = Field(default=128, ge=1)
    """Most memory, in MiB, for the logits of one chunk of the language-model head."""
    tensor_parallel: int = Field(default=1, ge=1)
    """`fsdp`, `megatron`: processes that share the matrices of every layer."""
    context_parallel: int = Field(default=1, ge=1)
    """`fsdp`, `megatron`: processes that share the tokens of every micro-batch, which may then hold that many times
    `max_tokens_per_device`."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """`megatron`: processes that hold the layers one after the other."""
    expert_parallel: int = Field(default=1, ge=1)
    """`fsdp`, `megatron`: processes that share the experts of every layer; they are counted among the data-parallel
    ones."""
    sequence_parallel: bool = False
    """`megatron`: with `tensor_parallel`, share the activations between the matrices as well."""
    reshard_after_forward: bool = True
    """`fsdp`: gather weights again for the backward pass, in place of keeping them gathered: less memory, more to
    send."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """`fsdp`, `deepspeed`: what is kept in the memory of the CPU: nothing, the optimizer, or the weights too."""
    zero_stage: Literal[1, 2, 3] = 2
    """`deepspeed`: what is divided over the processes: the optimizer (1), its gradients too (2), the weights too
    (3)."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Most seconds that processes which train together wait for one another before the run stops and names whom it
    waited for."""
    options: dict = Field(default_factory=dict)
    """`deepspeed`, `megatron`: settings of the library under its own names, as in `--megatron-recompute-granularity
    full`. What whet sets itself is refused."""

    @property
    def model_parallel(self) -> int:
        """Processes that hold one copy of the model between them and see the same rows."""
        return self.tensor_parallel * self.context_parallel * self.pipeline_parallel
