"""What DeepSpeed is told: what follows from our settings, and those of `backend.options` beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from whet.config.backend import BackendConfig
from whet.config.names import show
from whet.config.problems import Problem
from whet.config.run import RunConfig

OURS: Mapping[str, str] = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "backend.max_tokens_per_device",
    "gradient_accumulation_steps": "train.accumulation",
    "managed_gradient_accumulation": "train.accumulation",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "model.dtype and backend.precision",
    "bfloat16": "model.dtype and backend.precision",
    "fp16": "model.dtype and backend.precision",
    "torch_autocast": "backend.precision",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "optim",
    "zero_optimization.stage": "backend.zero_stage",
    "zero_optimization.overlap_comm": "nothing, as whet adds up gradients over any number of passes",
    "zero_optimization.offload_optimizer.device": "backend.offload",
    "zero_optimization.offload_param.device": "backend.offload",
    "zero_optimization.cpu_offload": "backend.offload",
}
"""DeepSpeed's settings that whet sets itself -> what sets them here."""
ELSEWHERE: Mapping[str, str] = {
    "sequence_parallel_size": "DeepSpeed's Ulysses; set backend.use to fsdp and backend.context_parallel",
    "tensor_parallel": "DeepSpeed's AutoTP; set backend.use to fsdp and backend.tensor_parallel",
    "autotp_size": "DeepSpeed's AutoTP; set backend.use to fsdp and backend.tensor_parallel",
    "pipeline": "DeepSpeed's pipelines; set backend.use to megatron and backend.pipeline_parallel",
    "compression_training": "compression while training; leave it out",
    "data_efficiency": "DeepSpeed's own sampling of data; leave it out",
    "curriculum_learning": "DeepSpeed's own sampling of data; leave it out",
    "compile": "DeepCompile; leave it out",
}
"""DeepSpeed's settings that would change what whet does, and what to do instead."""


def settings(config: BackendConfig, *, max_grad_norm: float | None, in_bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, and `backend.options` beside it.

    Gradients are added up over any number of passes until the update (`managed_gradient_accumulation`). With `in_bf16`
    all trained weights are bfloat16, and float32 ones are kept beside them.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": False}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm or 0.0,
        "bf16": {"enabled": in_bf16},
        # PyTorch's own AdamW, as with the other backends: DeepSpeed's is compiled at its first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return _merged(ours, {"steps_per_print": 1_000_000_000, **config.options})


def conflicts(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong with it) for each of `backend.options` that whet sets itself or cannot go along with."""
    for name in _names(options):
        for ours, setting in OURS.items():
            if f"{name}.".startswith(f"{ours}."):
                yield name, f"but whet sets it itself, by {setting}; remove it"
        top = name.partition(".")[0]
        if top in ELSEWHERE:
            yield name, f"which is {ELSEWHERE[top]}"


def deepspeed_problems(config: RunConfig) -> Iterator[Problem]:
    """Everything that does not go together on the backend deepspeed."""
    backend, model = config.backend, config.model
    if backend.use != "deepspeed":
        return
    for section, quantization in (("model", model.quantization), ("distill", config.distill.quantization)):
        if quantization is not None and backend.zero_stage == 3:
            yield Problem(
                (section, "quantization"),
                f"backend.zero_stage is 3, which divides weights over processes, and those of {section}.quantization "
                "cannot be divided: set backend.zero_stage to 2 (each process holds them whole, in "
                f"{quantization.bits} bits), or remove {section}.quantization and hold them in model.dtype bfloat16",
            )
    if backend.offload == "all" and backend.zero_stage < 3:
        yield Problem(
            ("backend", "offload"),
            f"backend.offload is 'all', but with backend.zero_stage {backend.zero_stage} the weights stay where they "
            "compute; set backend.zero_stage to 3, or backend.offload to optimizer",
        )
    if backend.precision == "fp16" or model.dtype == "float16":
        name = ("backend", "precision") if backend.precision == "fp16" else ("model", "dtype")
        yield Problem(
            name,
            f"{'.'.join(name)} is {show('fp16' if name[0] == 'backend' else model.dtype)}, which the backend deepspeed "
            "does not train in; use bf16 (backend.precision) over float32 weights, or model.dtype bfloat16",
        )
    for name, wrong in conflicts(backend.options):
        yield Problem(("backend", "options"), f"backend.options has {name}, {wrong}")


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings together; ours where both have one."""
    found = dict(theirs)
    for name, value in ours.items():
        other = theirs.get(name)
        found[name] = _merged(value, other) if isinstance(value, dict) and isinstance(other, Mapping) else value
    return found


def _names(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
