"""Names of Hugging Face's tools for several processes and for servers: DeepSpeed, FSDP, vLLM in TRL's trainers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.config.conversions import Alias, Converted, Refused, Unless, converted, idle, refused, renamed, switch

_HF = ("Hugging Face",)
_TRL = ("TRL",)

_VLLM = "it means `engine.use: vllm` unless that is given"
_SERVER = "give the server as engine.address, as in http://127.0.0.1:8000"
_FSDP_FREE = (
    *("auto_wrap_policy", "backward_prefetch", "cpu_ram_efficient_loading", "forward_prefetch", "min_num_params"),
    *("state_dict_type", "sync_module_states", "transformer_layer_cls_to_wrap", "use_orig_params", "version"),
)
"""Of FSDP's settings, those that change how weights are wrapped or sent, not what is computed."""


def deepspeed(value: object) -> Converted:
    """A DeepSpeed configuration, or the JSON file that holds one."""
    if value in (None, ""):
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(Path(value).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Refused(
                f"cannot be read ({type(error).__name__}); give backend.use: deepspeed with backend.zero_stage and "
                "backend.offload, or the file's path"
            ) from None
    if not isinstance(value, Mapping):
        raise Refused("must be a DeepSpeed configuration or the path of one")
    return zero(value.get("zero_optimization") or {})


def zero(written: Mapping[str, Any]) -> Converted:
    """DeepSpeed's `zero_optimization` as settings of the backend."""
    stage = written.get("stage", 0)
    if stage not in (1, 2, 3):
        raise Refused(f"has ZeRO stage {stage}, which divides nothing; use backend.use: fsdp, or a stage from 1 to 3")
    devices = {part: (written.get(f"offload_{part}") or {}).get("device", "none") for part in ("param", "optimizer")}
    found: dict[str, Any] = {"backend.use": "deepspeed", "backend.zero_stage": stage}
    if "nvme" in devices.values():
        raise Refused("offloads to nvme, which is not here; offload to cpu")
    if devices["param"] == "cpu":
        found["backend.offload"] = "all"
    elif devices["optimizer"] == "cpu":
        found["backend.offload"] = "optimizer"
    return found


def _fsdp(value: object) -> Converted:
    """`full_shard auto_wrap offload`, as a text or a list, or true."""
    if value in (None, "", False, []):
        return {}
    words = set(value.split() if isinstance(value, str) else value if isinstance(value, list) else ["full_shard"])
    if words & {"hybrid_shard", "hybrid_shard_zero2", "no_shard"}:
        raise Refused("must be full_shard or shard_grad_op, with auto_wrap and offload")
    found: dict[str, Any] = {"backend.use": "fsdp"}
    if "shard_grad_op" in words:
        found["backend.reshard_after_forward"] = False
    if "offload" in words:
        found["backend.offload"] = "all"
    return found


def fsdp_settings(value: object) -> Converted:
    """FSDP's settings, under Transformers' names or, with `fsdp_` before them, accelerate's."""
    if value in (None, {}):
        return {}
    if not isinstance(value, Mapping):
        raise Refused("must hold FSDP's settings")
    found: dict[str, Any] = {"backend.use": "fsdp"}
    for written, setting in value.items():
        name = str(written).removeprefix("fsdp_")
        if name == "reshard_after_forward":
            found["backend.reshard_after_forward"] = setting in (True, "FULL_SHARD", "full_shard")
        elif name == "sharding_strategy":
            found["backend.reshard_after_forward"] = str(setting) in ("FULL_SHARD", "1")
        elif name == "activation_checkpointing":
            found["backend.activation_checkpointing"] = bool(setting)
        elif name == "offload_params":
            found |= {"backend.offload": "all"} if setting else {}
        elif name not in _FSDP_FREE:
            raise Refused(f"has {written}, which has no counterpart; remove it")
    return found


def _mode(value: object) -> Converted:
    if value not in ("server", "colocate"):
        raise Refused("must be server or colocate")
    shares = {"cluster.colocate": True, "engine.use": Unless("vllm"), "engine.sleep": Unless(True)}
    return shares if value == "colocate" else {}


def _of_engine(name: str, target: str) -> Alias:
    def convert(value: object) -> Converted:
        return {} if value is None else {target: value, "engine.use": Unless("vllm")}

    return converted(_TRL, name, f"{target} engine.use", convert, _VLLM, switch=True)


PROCESS_NAMES = [
    renamed(("accelerate", "torchrun"), "num_processes", "cluster.num_processes"),
    renamed(("torchrun",), "nproc_per_node", "cluster.num_processes"),
    converted(
        _HF,
        "deepspeed",
        "backend.use backend.zero_stage backend.offload",
        deepspeed,
        "a configuration or its JSON file, of which ZeRO's stage and what it offloads are read",
    ),
    converted(
        _HF,
        "fsdp",
        "backend.use backend.reshard_after_forward backend.offload",
        _fsdp,
        "`full_shard` or `shard_grad_op`, with `offload`",
        switch=True,
    ),
    converted(
        _HF,
        "fsdp_config",
        "backend.use backend.reshard_after_forward backend.activation_checkpointing backend.offload",
        fsdp_settings,
        "what changes how weights are wrapped or sent has no effect",
    ),
    converted(
        _TRL,
        "use_vllm",
        "engine.use",
        lambda value: {"engine.use": "vllm"} if switch(value) else {},
        "true is `vllm`",
        switch=True,
    ),
    converted(
        _TRL,
        "vllm_mode",
        "cluster.colocate engine.use engine.sleep",
        _mode,
        f"`colocate` shares the trainer's GPUs; {_VLLM}",
    ),
    _of_engine("vllm_server_base_url", "engine.address"),
    _of_engine("vllm_server_timeout", "engine.start_timeout_s"),
    _of_engine("vllm_tensor_parallel_size", "engine.tensor_parallel"),
    _of_engine("vllm_enable_sleep_mode", "engine.sleep"),
    _of_engine("vllm_max_model_length", "engine.options.max_model_len"),
    refused(_TRL, "vllm_server_host", _SERVER, off=(None,)),
    refused(_TRL, "vllm_server_port", _SERVER, off=(None,)),
    idle(_TRL, "vllm_group_port", "a free port is found", only=None),
    refused(_TRL, "vllm_structured_outputs_regex", "completions are not held to a grammar in this version"),
    refused(_TRL, "vllm_importance_sampling_cap", "give correction.use and its limits", off=(None,)),
    refused(_TRL, "vllm_importance_sampling_mode", "give correction.use: tis or icepop", off=(None,)),
]
