"""Rules between the settings of backends, processes and engines: what does not go together, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from whet.config.backend import BackendConfig
from whet.config.base import Config
from whet.config.cluster import ClusterConfig
from whet.config.engine import EngineConfig, PublishConfig
from whet.config.names import did_you_mean, show
from whet.config.problems import Problem
from whet.config.run import RunConfig

BACKENDS = ("local", "fsdp", "deepspeed", "megatron")
"""Backends that can be chosen by name; rules that name them say nothing of one of a user's own."""
SERVERS = ("vllm", "sglang")
"""Engines that are servers."""
ENGINES = ("local", *SERVERS)
"""Engines that can be chosen by name."""
OF_BACKENDS: Mapping[str, tuple[str, ...]] = {
    "tensor_parallel": ("fsdp", "megatron"),
    "context_parallel": ("fsdp", "megatron"),
    "pipeline_parallel": ("megatron",),
    "expert_parallel": ("fsdp", "megatron"),
    "sequence_parallel": ("megatron",),
    "reshard_after_forward": ("fsdp",),
    "offload": ("fsdp", "deepspeed"),
    "zero_stage": ("deepspeed",),
    "options": ("deepspeed", "megatron"),
}
"""Settings of a backend, and the backends that have them."""
OF_SERVERS = (
    *("address", "num_engines", "tensor_parallel", "python", "options", "router", "start_timeout_s"),
    *("health_interval_s", "max_restarts", "sleep", "publish"),
)
"""Settings of an engine that only servers have."""
OF_EMBEDDED = ("prefix_cache_mb", "packed_weights", "cache")
"""Settings of an engine that only the embedded one has."""

OWN_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "vllm": {
        "model": "model.path",
        "seed": "seed",
        "tensor_parallel_size": "engine.tensor_parallel",
        **dict.fromkeys(("served_model_name", "host", "port", "enable_scale_out", "logprobs_mode"), ""),
    },
    "sglang": {
        "model_path": "model.path",
        "random_seed": "seed",
        "tp_size": "engine.tensor_parallel",
        "tensor_parallel_size": "engine.tensor_parallel",
        **dict.fromkeys(("host", "port", "skip_tokenizer_init"), ""),
    },
}
"""Options of a server that whet decides on, and the setting that stands for each."""


def is_spread(config: RunConfig) -> bool:
    """Whether the models of a run are spread over processes that rank 0 leads, be it the only one."""
    return config.backend.use in BACKENDS[1:] or config.cluster.size > 1


def parallel_problems(config: RunConfig) -> Iterator[Problem]:
    """Everything in backend, cluster and engine that does not go together."""
    if config.method == "sample" and is_spread(config):
        yield Problem(
            ("backend", "use"),
            f"sample trains nothing, so backend.use {config.backend.use!r} over {config.cluster.size} processes has no "
            "use; leave it at local, and set engine.use to vllm or sglang for a model that one device does not hold",
        )
    yield from _known("backend", config.backend, BACKENDS)
    yield from _known("engine", config.engine, ENGINES)
    yield from _backend(config.backend)
    yield from _fsdp(config)
    yield from _processes(config.backend, config.cluster)
    yield from _cluster(config.cluster)
    yield from _engine(config.engine, config.cluster)


def _known(where: str, section: BackendConfig | EngineConfig, names: Sequence[str]) -> Iterator[Problem]:
    """A name that is neither built in nor the path of something of the user's own."""
    if section.use not in names and not {".", ":"} & set(section.use):
        near = did_you_mean(section.use, names)
        text = (
            f"which is no {where}{near or '.'} Built in: {', '.join(names)}. Your own is written package.module:Class"
        )
        yield _problem(where, "use", section, text)


def _backend(backend: BackendConfig) -> Iterator[Problem]:
    for name, owners in OF_BACKENDS.items():
        if backend.use in BACKENDS and backend.use not in owners and _is_given(backend, name):
            yield _problem(
                "backend",
                name,
                backend,
                f"but the backend {backend.use} does not have it; remove it, or set backend.use to "
                f"{' or '.join(owners)}",
            )


def _fsdp(config: RunConfig) -> Iterator[Problem]:
    """What the backend fsdp cannot do with a model."""
    backend, model = config.backend, config.model
    if backend.use != "fsdp":
        return
    if model.quantization is not None:
        yield Problem(
            ("model", "quantization"),
            "model.quantization is given, but the backend fsdp shards plain weights only; set backend.use to deepspeed "
            "(zero_stage 2) or local, or remove it",
        )
    if backend.precision == "fp16":
        text = "but the backend fsdp does not scale losses over processes; use bf16, which needs no scaling"
        yield _problem("backend", "precision", backend, text)
    divided = [name for name in ("tensor_parallel", "context_parallel") if getattr(backend, name) > 1]
    if divided and model.attention == "rows":
        text = "but model.attention is 'rows', and padded rows are not cut into slices; leave model.attention at auto"
        yield _problem("backend", divided[0], backend, text)
    adapter = model.adapter
    if backend.tensor_parallel > 1 and adapter is not None:
        is_anchored = adapter.init == "olora" or adapter.init.startswith("pissa")
        for name, is_given in (("dora", adapter.dora), ("init", is_anchored)):
            if is_given:
                text = f"but model.adapter.{name} {show(getattr(adapter, name))} is of whole matrices; remove one"
                yield _problem("backend", "tensor_parallel", backend, text)


def _processes(backend: BackendConfig, cluster: ClusterConfig) -> Iterator[Problem]:
    size, parallel = cluster.size, backend.model_parallel
    if backend.use == "local" and size > 1:
        name = "num_processes" if cluster.num_processes else "devices_per_node"
        yield Problem(
            ("cluster", name),
            f"{size} processes train (cluster), but the backend local is one process; set backend.use to fsdp (or "
            "deepspeed, megatron)",
        )
    if size % parallel:
        yield Problem(
            ("cluster", "num_processes"),
            f"{size} processes train (cluster), but each copy of the model takes backend.tensor_parallel x "
            f"context_parallel x pipeline_parallel = {backend.tensor_parallel} x {backend.context_parallel} x "
            f"{backend.pipeline_parallel} = {parallel}; set cluster.num_processes to a multiple of {parallel}",
        )
    elif (over := _over_experts(backend, size)) % backend.expert_parallel:
        yield _problem(
            "backend",
            "expert_parallel",
            backend,
            f"but experts are divided over the {over} processes that see other tokens; choose a divisor of it",
        )


def _over_experts(backend: BackendConfig, size: int) -> int:
    """Processes over which experts can be divided: in Megatron-Core, where matrices of experts are not divided
    themselves, those that share the other matrices as well."""
    options = {name.replace("-", "_"): value for name, value in backend.options.items()}
    whole = backend.use == "megatron" and options.get("expert_tensor_parallel_size") in (1, "1")
    return size // backend.model_parallel * backend.context_parallel * (backend.tensor_parallel if whole else 1)


def _cluster(cluster: ClusterConfig) -> Iterator[Problem]:
    spread = cluster.num_nodes * cluster.devices_per_node
    is_spread = _is_given(cluster, "num_nodes") or _is_given(cluster, "devices_per_node")
    if cluster.num_processes is not None and is_spread and cluster.num_processes != spread:
        yield _problem(
            "cluster",
            "num_processes",
            cluster,
            f"but num_nodes x devices_per_node = {cluster.num_nodes} x {cluster.devices_per_node} = {spread}; keep one",
        )
    if cluster.num_nodes > 1 and cluster.address is None:
        yield _problem(
            "cluster",
            "num_nodes",
            cluster,
            "but without cluster.address everything runs on this machine; set cluster.address to a Ray cluster (auto), "
            "or start the same command on every node with torchrun",
        )


def _engine(engine: EngineConfig, cluster: ClusterConfig) -> Iterator[Problem]:
    for name in OF_EMBEDDED if engine.use != "local" else ():
        if _is_given(engine, name):
            text = f"but only the embedded engine has it (engine.use is {engine.use!r}); remove it"
            yield _problem("engine", name, engine, text)
    for name in OF_SERVERS if engine.use == "local" else ():
        if _is_given(engine, name):
            text = "but the embedded engine (engine.use local) has no such thing; set engine.use to vllm or sglang"
            yield _problem("engine", name, engine, text)
    for name in engine.options:
        setting = OWN_OPTIONS.get(engine.use, {}).get(str(name).replace("-", "_"))
        if setting is not None:
            remedy = f"set {setting} instead" if setting else "remove it"
            text = f"engine.options has {name}, which whet sets itself when it starts {engine.use}; {remedy}"
            yield Problem(("engine", "options"), text)
    if engine.router == "sglang-router" and engine.use == "vllm":
        text = "but it does not know vLLM's calls for tokens; leave it out, or set engine.use to sglang"
        yield _problem("engine", "router", engine, text)
    if engine.use == "sglang" and engine.publish.delta and engine.publish.by == "file":
        text = (
            "engine.publish.delta is true, but sglang reads complete folders only; set engine.publish.by to broadcast"
        )
        yield Problem(("engine", "publish"), text)
    if engine.publish.delta and engine.publish.by == "shared":
        text = (
            "but what is shared is not sent, so there is nothing to save; remove it, or set engine.publish.by to file"
        )
        yield Problem(("engine", "publish"), f"engine.publish.delta is true, {text}")
    if engine.address is not None:
        yield from _addresses(engine)
        for name in ("num_engines", "tensor_parallel", "python", "options", "start_timeout_s", "max_restarts"):
            if _is_given(engine, name):
                text = "but the servers of engine.address run already, and are not started by this run; remove one"
                yield _problem("engine", name, engine, text)
    if cluster.colocate and engine.use == "local":
        text = "but the embedded engine always shares the trainer's device; remove it, or set engine.use to vllm"
        yield _problem("cluster", "colocate", cluster, text)


def _addresses(engine: EngineConfig) -> Iterator[Problem]:
    """Servers that are not written as a client needs them."""
    addresses = [engine.address] if isinstance(engine.address, str) else engine.address or []
    wrong = [address for address in addresses if not re.match(r"https?://[^/\s]", address)]
    if wrong or not addresses:
        told = show(wrong[0] if wrong else engine.address)
        yield Problem(("engine", "address"), f"engine.address has {told}; write each as http://host:port")
    elif len(set(addresses)) < len(addresses):
        text = "engine.address names a server twice; name each once"
        yield Problem(("engine", "address"), text)


def _is_given(section: Config, name: str) -> bool:
    return getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True)


def _problem(where: str, name: str, section: Config, text: str) -> Problem:
    value: Any = getattr(section, name)
    value = value.model_dump(exclude_defaults=True) if isinstance(value, PublishConfig) else value
    return Problem((where, name), f"{where}.{name} is {show(value)}, {text}")
