"""slime's names of where a run lies: nodes, GPUs, parallelism, servers, offloading; with Megatron's and SGLang's."""

from __future__ import annotations

from collections.abc import Callable

from whet.config.conversions import (
    Alias,
    Converted,
    Refused,
    Unless,
    checked,
    converted,
    idle,
    refused,
    switch,
    whole_number,
)
from whet.config.run import RunConfig

_SLIME = ("slime",)

_MEGATRON = "1 divides nothing; above 1 it means `backend.use: megatron` unless that is given"
_SGLANG = "it means `engine.use: sglang` unless that is given"
_WHOLE = "whole layers are computed again (backend.activation_checkpointing)"
_WATCHED = "servers are always watched, and started again when they die"


def _parallel(target: str) -> Callable[[object], Converted]:
    """A number of processes between which something is divided; 1 asks for nothing."""

    def convert(value: object) -> Converted:
        whole_number(value)
        return {} if value == 1 else {target: value, "backend.use": Unless("megatron")}

    return convert


def _nodes(value: object) -> Converted:
    whole_number(value)
    if value == 1:
        return {}
    return {"cluster.num_nodes": value, "cluster.address": Unless("auto"), "backend.use": Unless("megatron")}


def _colocate(value: object) -> Converted:
    if not switch(value):
        return {}
    return {"cluster.colocate": True, "engine.sleep": Unless(True), "engine.use": Unless("sglang")}


def _server(target: str) -> Callable[[object], Converted]:
    return lambda value: {target: value, "engine.use": Unless("sglang")}


def _per_engine(value: object) -> Converted:
    whole_number(value)
    return {} if value == 1 else {"engine.tensor_parallel": value, "engine.use": Unless("sglang")}


def _sampling_gpus(config: RunConfig, value: int) -> str | None:
    engine = config.engine
    have = engine.num_engines * engine.tensor_parallel
    if config.cluster.colocate or value == have:
        return None
    fitting = value // engine.tensor_parallel if value % engine.tensor_parallel == 0 else None
    return (
        f"but engine.num_engines {engine.num_engines} x engine.tensor_parallel {engine.tensor_parallel} = {have}; "
        + (f"set engine.num_engines to {fitting}, " if fitting else "change one of them, ")
        + "or leave this out"
    )


def _recompute(value: object) -> Converted:
    if value in (None, "full"):
        return {"backend.activation_checkpointing": True} if value else {}
    raise Refused("must be full: parts of layers are not chosen here; or leave it out")


def _option(name: str) -> Alias:
    """An option of Megatron-Core's, which it is handed as it is."""
    target = f"backend.options.{name}"

    def convert(value: object) -> Converted:
        return {} if value in (None, False) else {target: value, "backend.use": Unless("megatron")}

    return converted(_SLIME, name, f"{target} backend.use", convert, "given to Megatron-Core as it is", switch=True)


def _expert_tensor(value: object) -> Converted:
    whole_number(value)
    return {"backend.options.expert_tensor_parallel_size": value, "backend.use": Unless("megatron")}


def _minutes(value: object) -> Converted:
    whole_number(value)
    assert isinstance(value, int), "it is a whole number"
    return {"backend.timeout_s": 60.0 * value}


def _bucket(value: object) -> Converted:
    whole_number(value)
    assert isinstance(value, int), "it is a whole number"
    return {"engine.publish.bucket_mb": max(1, value // 2**20), "engine.use": Unless("sglang")}


def _backend(value: object) -> Converted:
    if value not in ("megatron", "fsdp"):
        raise Refused("must be megatron or fsdp")
    return {"backend.use": value}


SLIME_PLACEMENT_NAMES = [
    converted(
        _SLIME,
        "actor_num_nodes",
        "cluster.num_nodes cluster.address backend.use",
        _nodes,
        "above 1 it means `cluster.address: auto` and `backend.use: megatron` unless these are given",
    ),
    converted(
        _SLIME,
        "actor_num_gpus_per_node",
        "cluster.devices_per_node backend.use",
        _parallel("cluster.devices_per_node"),
        _MEGATRON,
    ),
    converted(
        _SLIME,
        "colocate",
        "cluster.colocate engine.sleep engine.use",
        _colocate,
        "true means `engine.sleep: true` and `engine.use: sglang` as well, unless these are given",
        switch=True,
    ),
    converted(
        _SLIME, "rollout_num_gpus_per_engine", "engine.tensor_parallel engine.use", _per_engine, f"above 1 {_SGLANG}"
    ),
    checked(
        _SLIME,
        "rollout_num_gpus",
        "must be `engine.num_engines` x `engine.tensor_parallel`, unless engines and trainer share GPUs",
        _sampling_gpus,
    ),
    converted(_SLIME, "rollout_external_engine_addrs", "engine.address engine.use", _server("engine.address"), _SGLANG),
    idle(_SLIME, "rollout_external", "engine.address says it"),
    refused(_SLIME, "sglang_router_ip", "give the servers as engine.address", off=(None,)),
    refused(_SLIME, "sglang_router_port", "give the servers as engine.address", off=(None,)),
    converted(
        _SLIME,
        "sglang_server_concurrency",
        "engine.max_concurrent engine.use",
        _server("engine.max_concurrent"),
        f"that of all servers together; {_SGLANG}",
    ),
    *(
        converted(_SLIME, name, f"{target} backend.use", _parallel(target), _MEGATRON)
        for name, target in {
            "tensor_model_parallel_size": "backend.tensor_parallel",
            "pipeline_model_parallel_size": "backend.pipeline_parallel",
            "context_parallel_size": "backend.context_parallel",
            "expert_model_parallel_size": "backend.expert_parallel",
        }.items()
    ),
    converted(
        _SLIME,
        "expert_tensor_parallel_size",
        "backend.options.expert_tensor_parallel_size backend.use",
        _expert_tensor,
        "it means `backend.use: megatron` unless that is given",
    ),
    converted(
        _SLIME,
        "sequence_parallel",
        "backend.sequence_parallel backend.use",
        lambda value: {"backend.sequence_parallel": True, "backend.use": Unless("megatron")} if switch(value) else {},
        "it means `backend.use: megatron` unless that is given",
        switch=True,
    ),
    converted(
        _SLIME, "recompute_granularity", "backend.activation_checkpointing", _recompute, "`full` is true; no other"
    ),
    idle(_SLIME, "recompute_method", _WHOLE, only=None),
    idle(_SLIME, "recompute_num_layers", _WHOLE, only=None),
    *map(
        _option,
        (
            *("optimizer_cpu_offload", "overlap_cpu_optimizer_d2h_h2d", "use_precision_aware_optimizer"),
            *("moe_token_dispatcher_type", "moe_enable_deepep"),
        ),
    ),
    converted(
        _SLIME,
        "decoder_last_pipeline_num_layers",
        "backend.options.num_layers_in_last_pipeline_stage backend.use",
        lambda value: {
            "backend.options.num_layers_in_last_pipeline_stage": value,
            "backend.use": Unless("megatron"),
        },
        "given to Megatron-Core under its own name",
    ),
    converted(_SLIME, "train_backend", "backend.use", _backend, "`megatron` or `fsdp`"),
    converted(_SLIME, "distributed_timeout_minutes", "backend.timeout_s", _minutes, "in seconds here"),
    converted(
        _SLIME,
        "update_weight_buffer_size",
        "engine.publish.bucket_mb engine.use",
        _bucket,
        f"bytes become MiB; {_SGLANG}",
    ),
    converted(
        _SLIME,
        "offload_rollout",
        "engine.sleep engine.use",
        lambda value: {"engine.sleep": True, "engine.use": Unless("sglang")} if switch(value) else {},
        _SGLANG,
        switch=True,
    ),
    converted(
        _SLIME,
        "rollout_health_check_interval",
        "engine.health_interval_s engine.use",
        _server("engine.health_interval_s"),
        _SGLANG,
    ),
    idle(_SLIME, "use_fault_tolerance", _WATCHED),
    idle(_SLIME, "rollout_health_check_timeout", _WATCHED, only=None),
    idle(_SLIME, "rollout_health_check_first_wait", _WATCHED, only=None),
    idle(_SLIME, "use_slime_router", "engine.router chooses between whet's own and sglang-router"),
    idle(_SLIME, "num_gpus_per_node", "cluster.devices_per_node says it", only=None),
    idle(_SLIME, "offload", "engine.sleep is for servers; a backend that trains keeps what it has", only=None),
    idle(_SLIME, "offload_train", "a backend that trains keeps what it has; see backend.offload", only=None),
    idle(_SLIME, "balance_data", "units are always spread over processes by their tokens"),
    idle(_SLIME, "use_distributed_optimizer", "Megatron's optimizer is always divided over the processes"),
    idle(_SLIME, "distributed_backend", "NCCL between GPUs, gloo between CPUs", only=None),
]
