"""Megatron's optimizer over this rank's part of a model: gradients summed over ranks, clipped, and applied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from whet.backends.device import Arithmetic
from whet.backends.megatron.model import Decoder
from whet.backends.megatron.settings import ddp_config, optimizer_config
from whet.config.backend import BackendConfig
from whet.config.optim import OptimConfig
from whet.errors import CheckpointError, TrainingError

FOLDER = "megatron"
"""Within a checkpoint, what Megatron writes: the optimizer's state, in pieces that any layout of ranks can read."""


class Optimizer:
    """AdamW over a decoder, which it wraps: `model` is what forward and backward passes run through."""

    def __init__(
        self,
        decoder: Decoder,
        optim: OptimConfig,
        backend: BackendConfig,
        arithmetic: Arithmetic,
        extra: Mapping[str, Any],
    ) -> None:
        self.max_norm, self.weight_decay = optim.max_grad_norm, optim.weight_decay
        self.model = DistributedDataParallel(decoder.config, ddp_config(extra=extra), decoder)
        self.inner = get_megatron_optimizer(optimizer_config(optim, backend, arithmetic, extra=extra), [self.model])
        self._decoder = decoder

    def step(self, lr: float) -> float:
        """Sum gradients over ranks, clip, update, clear. Returns the norm of the whole gradient before clipping.

        Raises TrainingError, on all ranks, where it is not finite; nothing is updated then.
        """
        finalize_model_grads([self.model], None)
        self.inner.prepare_grads()
        norm = float(self.inner.get_grad_norm())
        if not math.isfinite(norm):
            self._clear()
            raise TrainingError(
                f"the gradient norm is {norm}, although the loss is finite; lower optim.lr, or use float32 or bf16 "
                "arithmetic (backend.precision). Nothing was updated"
            )
        if norm > 0:  # else no token of the batch was trained
            for one in self._parts() if self.max_norm else ():
                decoupled = one.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                if parameters := one.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, self.max_norm, norm, decoupled)
            for group in self.inner.param_groups:
                group["lr"] = lr * group["lr_mult"]
                group["weight_decay"] = self.weight_decay * group["wd_mult"]  # none on vectors
            self.inner.step_with_ready_grads()
        self._clear()
        return norm

    def reload(self) -> None:
        """Weights were set from outside: so are the optimizer's own copies of them."""
        self.inner.reload_model_params()

    def save(self, folder: Path) -> None:
        """All ranks write the state into one folder."""
        target = folder / FOLDER
        if dist.get_rank() == 0:
            target.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(self._state(loading=False), str(target))

    def load(self, folder: Path) -> None:
        """The state that `save` wrote, with any layout of ranks. Raises CheckpointError."""
        source = folder / FOLDER
        if not source.is_dir():
            raise CheckpointError(
                f"{folder} has no folder {FOLDER}: it was written with another backend; resume with it"
            )
        try:
            found = dist_checkpointing.load(self._state(loading=True), str(source))
        except CheckpointingException as error:
            raise CheckpointError(
                f"{source} does not fit the model: {error}; resume with the model it is of"
            ) from error
        self.inner.load_state_dict(found["optimizer"])

    def offload(self) -> None:
        """State and gradients leave the accelerator."""
        self.inner.offload_to_cpu()
        for buffer in self._buffers():
            buffer.offload_to_cpu(move_params=True, move_grads=True)

    def onload(self) -> None:
        """They come back, gradients as zeros."""
        for buffer in self._buffers():
            buffer.reload_from_cpu(move_params=True, move_grads=True)
        self.inner.restore_from_cpu()

    def _state(self, *, loading: bool) -> dict[str, Any]:
        for one in self._parts():
            _begin(one.optimizer)
        model = self._decoder.sharded_state_dict()
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        return {"optimizer": self.inner.sharded_state_dict(model, is_loading=loading, metadata=metadata)}

    def _parts(self) -> list[Any]:
        return getattr(self.inner, "chained_optimizers", [self.inner])

    def _buffers(self) -> list[Any]:
        return [*self.model.buffers, *self.model.expert_parallel_buffers]

    def _clear(self) -> None:
        self.model.zero_grad_buffer()
        self.inner.zero_grad()


def _begin(optimizer: torch.optim.Optimizer | None) -> None:
    """Give AdamW the state of no step: before its first, Megatron finds none, and cannot save or load it."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
