"""Megatron-Core's own settings, from ours and from what a user passes on to it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, OptimizerConfig
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from whet.backends.device import Arithmetic
from whet.config.backend import BackendConfig
from whet.config.optim import OptimConfig
from whet.errors import ConfigError
from whet.weights.megatron.blueprint import Blueprint

PARALLEL = {
    "tensor_model_parallel_size": "backend.tensor_parallel",
    "pipeline_model_parallel_size": "backend.pipeline_parallel",
    "context_parallel_size": "backend.context_parallel",
    "expert_model_parallel_size": "backend.expert_parallel",
    "sequence_parallel": "backend.sequence_parallel",
    "params_dtype": "backend.precision",
    "bf16": "backend.precision",
    "fp16": "backend.precision",
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_eps": "optim.eps",
    "clip_grad": "optim.max_grad_norm",
}
"""Megatron's names of what has a setting of ours."""
OURS = {
    **dict.fromkeys(("calculate_per_token_loss", "average_in_collective"), "whet weighs every token itself"),
    **dict.fromkeys(("grad_scale_func", "finalize_model_grads_func", "no_sync_func"), "whet sets it"),
    **dict.fromkeys(
        ("variable_seq_lengths", "pipeline_dtype", "perform_initialization", "init_method"), "whet sets it"
    ),
    "virtual_pipeline_model_parallel_size": "each process holds one run of layers",
    "mtp_num_layers": "there is no loss for the prediction of further tokens",
    "hybrid_context_parallel": "whet divides the tokens itself",
    "overlap_grad_reduce": "gradients are summed once for each optimizer step",
    "use_megatron_fsdp": "there is backend fsdp",
    "expert_tensor_parallel_size": "experts are divided like the other matrices (backend.tensor_parallel)",
    "loss_scale": "losses are not scaled",
}
"""Settings that are refused, and why."""
DEFAULTS: dict[str, Any] = {
    "calculate_per_token_loss": True,
    "variable_seq_lengths": True,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "attention_softmax_in_fp32": True,
    "moe_token_dispatcher_type": "alltoall",
}
"""Fused kernels need packages that need not be there; options may turn them on."""


def check_options(options: Mapping[str, Any], model: Blueprint) -> None:
    """Raises ConfigError, with all of them, for options that Megatron does not have, that whet sets, or that would make
    it compute something else than the model."""
    known = {
        name
        for config in (MLATransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
        for name in (field.name for field in fields(config))
    }
    problems = []
    for name in options:
        if name in PARALLEL:
            problems.append(f"{name} is {PARALLEL[name]}")
        elif name in OURS:
            problems.append(f"{name} is not to be set: {OURS[name]}")
        elif name in model.settings:
            problems.append(f"{name} follows from the model, where it is {model.settings[name]!r}")
        elif name not in known:
            near = difflib.get_close_matches(name, known, 1)
            problems.append(f"{name} is no setting of Megatron-Core{f'; did you mean {near[0]}?' if near else ''}")
    if options.get("use_distributed_optimizer") and USING_PYTORCH_OPTIMIZER:
        problems.append(
            "use_distributed_optimizer needs transformer-engine or apex: with PyTorch's AdamW, Megatron-Core does not "
            "load exactly what it saved, so that no run could go on"
        )
    if problems:
        raise ConfigError("backend.options: " + "; ".join(problems))


def check_installed(model: Blueprint) -> None:
    """Raises ConfigError for a model whose layers Megatron-Core cannot build without transformer-engine."""
    lacking = []
    if model.num_experts and not hasattr(moe_utils, "te_general_gemm"):
        lacking.append("experts")
    if model.latent and not isinstance(multi_latent_attention.TELinear, type):
        lacking.append("latent attention")
    if lacking:
        raise ConfigError(
            f"backend.use is megatron and the model has {' and '.join(lacking)}, for which Megatron-Core 0.16 needs "
            "transformer-engine; install transformer-engine[pytorch] (with a GPU), or set backend.use to fsdp"
        )


def transformer_config(
    model: Blueprint, backend: BackendConfig, arithmetic: Arithmetic, *, extra: Mapping[str, Any]
) -> TransformerConfig:
    """The configuration of one model. `extra` are the user's options, of which it takes its own.

    Raises ConfigError where Megatron refuses the combination.
    """
    kind = MLATransformerConfig if model.latent else TransformerConfig
    dtype = arithmetic.autocast or torch.float32
    settings = {
        **DEFAULTS,
        **model.settings,
        "activation_func": F.silu,
        # Weights are read, not drawn; but only where they would be drawn does Megatron note how they are divided.
        **dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"), _leave),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": arithmetic.device.type == "cpu",
        "tensor_model_parallel_size": backend.tensor_parallel,
        "pipeline_model_parallel_size": backend.pipeline_parallel,
        "context_parallel_size": backend.context_parallel,
        "expert_model_parallel_size": backend.expert_parallel,
        "sequence_parallel": backend.sequence_parallel,
    }
    if model.latent:
        # It would have Megatron sum gradients of the query's norm over ranks, each of which has the whole of it.
        settings["qk_layernorm"] = False
    if backend.activation_checkpointing:
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return _make(kind, settings | _own(kind, extra))


def optimizer_config(
    optim: OptimConfig, backend: BackendConfig, arithmetic: Arithmetic, *, extra: Mapping[str, Any]
) -> OptimizerConfig:
    """AdamW as whet's own settings say, with the user's options."""
    settings = {
        "optimizer": "adam",
        "lr": optim.lr,
        "min_lr": 0.0,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "adam_eps": optim.eps,
        "clip_grad": optim.max_grad_norm,
        "params_dtype": arithmetic.autocast or torch.float32,
        "bf16": arithmetic.autocast == torch.bfloat16,
    }
    return _make(OptimizerConfig, settings | _own(OptimizerConfig, extra))


def ddp_config(*, extra: Mapping[str, Any]) -> DistributedDataParallelConfig:
    """How gradients are summed: in float32, once for each optimizer step."""
    return _make(
        DistributedDataParallelConfig,
        {"grad_reduce_in_fp32": True, "overlap_grad_reduce": False, "average_in_collective": False}
        | _own(DistributedDataParallelConfig, extra),
    )


def _leave(tensor: Tensor) -> Tensor:
    return tensor


def _own(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a configuration has, as the types that it wants."""
    known = {field.name: field for field in fields(kind)}
    return {name: _typed(known[name], value) for name, value in options.items() if name in known}


def _typed(field: Field, value: Any) -> Any:
    """A type written as a word (`exp_avg_dtype: bf16`) is meant as torch's."""
    if isinstance(field.default, torch.dtype) and isinstance(value, str) and field.default is not MISSING:
        found = getattr(torch, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(value, value), None)
        if not isinstance(found, torch.dtype):
            raise ConfigError(f"backend.options: {field.name} is {value!r}, expected a type such as bf16 or fp32")
        return found
    return value


def _make(kind: type, settings: Mapping[str, Any]) -> Any:
    try:
        return kind(**settings)
    except (ValueError, AssertionError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"backend.options: Megatron-Core refuses these settings: {error}") from error
