"""How a run is laid out over devices: what is written in a configuration, and what else there could be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from whet.config.run import RunConfig
from whet.hardware import Machines
from whet.models.shape import experts, kv_heads
from whet.plan.models import Sized

TENSOR = (1, 2, 4, 8)
CONTEXT = (1, 2, 4, 8)
PIPELINE = (1, 2, 4, 8, 16)
SERVERS = ("vllm", "sglang")


@dataclass(frozen=True)
class Arrangement:
    """Devices that train and how a model is divided over them, and devices that sample."""

    backend: str = "local"
    devices: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence: bool = False
    zero_stage: int = 2
    reshard: bool = True
    offload: str = "none"
    checkpointing: bool = False
    engine: str = "local"
    engines: int = 0
    engine_tensor: int = 1
    colocate: bool = False
    sleep: bool = False

    @property
    def shards(self) -> int:
        """Devices that see other tokens; weights are divided over them too, where the backend does that."""
        return self.devices // (self.tensor * self.pipeline)

    @property
    def data(self) -> int:
        """Devices that see other units."""
        return self.shards // self.context

    @property
    def sampling(self) -> int:
        """Devices that sample."""
        return self.engines * self.engine_tensor

    @property
    def total(self) -> int:
        """Devices in all."""
        return max(self.devices, self.sampling) if self.colocate else self.devices + self.sampling

    def __str__(self) -> str:
        parts = [f"data {self.data}"]
        sizes = {"tensor": self.tensor, "context": self.context, "pipeline": self.pipeline, "expert": self.expert}
        parts += [f"{name} {size}" for name, size in sizes.items() if size > 1]
        parts += [f"stage {self.zero_stage}"] if self.backend == "deepspeed" else []
        parts += ["recomputing"] if self.checkpointing else []
        parts += [f"offload {self.offload}"] if self.offload != "none" else []
        text = f"{self.backend} on {self.devices} ({', '.join(parts)})"
        if self.engines:
            where = " on the same" if self.colocate else ""
            text += f"; {self.engines} {self.engine} of {self.engine_tensor}{where}"
        return text


def arrangement_of(config: RunConfig, *, samples: bool) -> Arrangement:
    """What a configuration says. `samples`: whether its method samples completions."""
    backend, engine, cluster = config.backend, config.engine, config.cluster
    served = samples and engine.use != "local"
    offload = backend.offload
    options = {name.replace("-", "_"): value for name, value in backend.options.items()}
    if backend.use == "megatron" and options.get("optimizer_cpu_offload"):
        offload = "optimizer"
    own = backend.tensor_parallel if backend.use == "megatron" else 1
    return Arrangement(
        backend=backend.use,
        devices=cluster.size,
        tensor=backend.tensor_parallel,
        context=backend.context_parallel,
        pipeline=backend.pipeline_parallel,
        expert=backend.expert_parallel,
        expert_tensor=int(options.get("expert_tensor_parallel_size") or own),
        sequence=backend.sequence_parallel,
        zero_stage=backend.zero_stage,
        reshard=backend.reshard_after_forward,
        offload=offload,
        checkpointing=backend.activation_checkpointing,
        engine=engine.use if samples else "none",
        engines=engine.num_engines if served else 0,
        engine_tensor=engine.tensor_parallel if served else 1,
        colocate=cluster.colocate and served,
        sleep=engine.sleep,
    )


def settings_of(how: Arrangement, per_node: int, config: RunConfig) -> dict[str, Any]:
    """The settings that make this arrangement of a configuration, as flags name them: all whose value differs there."""
    wanted: dict[str, Any] = {"backend.use": how.backend} | _processes(how, per_node, config)
    wanted |= {
        **{"backend.tensor_parallel": how.tensor, "backend.context_parallel": how.context},
        **{"backend.pipeline_parallel": how.pipeline, "backend.expert_parallel": how.expert},
        **{"backend.sequence_parallel": how.sequence, "backend.activation_checkpointing": how.checkpointing},
    }
    if how.backend == "deepspeed":
        wanted["backend.zero_stage"] = how.zero_stage
    if how.backend != "megatron":
        wanted["backend.offload"] = how.offload
    if how.engine in ("local", *SERVERS):
        served = how.engine in SERVERS
        wanted |= {"engine.use": how.engine, "engine.num_engines": how.engines if served else 1}
        wanted |= {"engine.tensor_parallel": how.engine_tensor if served else 1}
        wanted |= {"cluster.colocate": how.colocate, "engine.sleep": how.sleep}
    changed = {name: value for name, value in wanted.items() if _value(config, name) != value}
    return changed | (_options(how, config) if how.backend == "megatron" else {})


def _processes(how: Arrangement, per_node: int, config: RunConfig) -> dict[str, Any]:
    nodes = -(-how.devices // per_node)
    if nodes == 1:
        return {} if config.cluster.size == how.devices else {"cluster.num_processes": how.devices}
    found: dict[str, Any] = {"cluster.num_nodes": nodes, "cluster.devices_per_node": how.devices // nodes}
    if config.cluster.num_processes is not None:
        found["cluster.num_processes"] = how.devices
    return found


def _options(how: Arrangement, config: RunConfig) -> dict[str, Any]:
    """Options of Megatron that differ, under the names that the configuration writes them by."""
    given = config.backend.options
    names = {name.replace("-", "_"): name for name in given}
    found: dict[str, Any] = {}
    for option, value, default in (
        ("optimizer_cpu_offload", how.offload != "none", False),
        ("expert_tensor_parallel_size", how.expert_tensor, how.tensor),
    ):
        name = names.get(option, option)
        if (given.get(name) or default) != value:
            found[f"backend.options.{name}"] = value
    return found


def _value(config: RunConfig, name: str) -> Any:
    section, setting = name.split(".")
    return getattr(getattr(config, section), setting)


def others(base: Arrangement, model: Sized, machines: Machines, *, samples: bool) -> Iterator[Arrangement]:
    """Every arrangement over these machines that the backend of `base` can have; fsdp in place of local."""
    total = machines.devices
    backend = "fsdp" if base.backend == "local" and total > 1 else base.backend
    if total == 1 and base.backend == "local":
        alone = replace(base, devices=1, engines=0, engine_tensor=1, engine="local" if samples else "none")
        for checkpointing in sorted({base.checkpointing, True}):
            yield replace(alone, colocate=False, sleep=False, checkpointing=checkpointing)
        return
    for split in _splits(base, machines, samples=samples):
        for divided in _divisions(replace(split, backend=backend), model, machines):
            for checkpointing in sorted({base.checkpointing, True}):
                yield replace(divided, checkpointing=checkpointing)


def _splits(base: Arrangement, machines: Machines, *, samples: bool) -> Iterator[Arrangement]:
    """Which devices train and which sample: all, and all; or whole nodes, or a half or a quarter of one, apart."""
    total = machines.devices
    if not samples:
        yield replace(base, devices=total, engines=0, colocate=False)
        return
    engine = base.engine if base.engine in SERVERS else "vllm"
    apart = (total // 4, total // 2, total * 3 // 4) if total > 1 else ()
    for tensor in (size for size in (*TENSOR, 16, 32) if size <= total):
        if total % tensor == 0:
            yield replace(
                base,
                **{"engine": engine, "devices": total, "colocate": True, "sleep": True},
                **{"engines": total // tensor, "engine_tensor": tensor},
            )
        for devices in dict.fromkeys(apart):
            if devices and (total - devices) % tensor == 0:
                rest = {"engines": (total - devices) // tensor, "engine_tensor": tensor}
                yield replace(base, engine=engine, devices=devices, colocate=False, sleep=False, **rest)


def _divisions(split: Arrangement, model: Sized, machines: Machines) -> Iterator[Arrangement]:
    """How a model is divided over the devices that train."""
    devices, per_node = split.devices, min(machines.per_node, split.devices)
    if split.backend == "deepspeed":
        plain = replace(split, tensor=1, context=1, pipeline=1, expert=1)
        for stage in (1, 2, 3):
            for offload in ("none", "optimizer", "all") if stage == 3 else ("none", "optimizer"):
                yield replace(plain, zero_stage=stage, offload=offload)
        return
    total, _ = experts(model.text)
    is_megatron = split.backend == "megatron"
    for tensor in (size for size in TENSOR if size <= per_node and _divides_heads(size, model)):
        for pipeline in PIPELINE if is_megatron else (1,):
            for context in CONTEXT:
                if devices % (tensor * pipeline * context) or pipeline > model.text.num_hidden_layers:
                    continue
                shards = devices // (tensor * pipeline)
                over = shards * tensor if is_megatron else shards  # tensor-parallel ranks hold whole experts too
                sizes = [1] if total == 1 else [n for n in (1, 2, 4, 8, 16, 32, 64) if not (over % n or total % n)]
                for expert in sizes:
                    for offload in ("none", "optimizer") if is_megatron else ("none", "optimizer", "all"):
                        yield replace(
                            split,
                            **{"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert},
                            **{"offload": offload, "sequence": is_megatron and tensor > 1},
                            expert_tensor=tensor if is_megatron and expert == 1 else 1,
                        )


def _divides_heads(size: int, model: Sized) -> bool:
    heads, keys = model.text.num_attention_heads, kv_heads(model.text)
    return heads % size == 0 and keys % size == 0
