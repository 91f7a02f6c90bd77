"""The memory that a run will take, by what takes it, before any weight is loaded.

Weights, gradients and optimizer are counted on the model's parameters without content; activations and logits are
those of a rehearsed step (see `rehearsal`). The peak of a run is that of its worst moment: what is alive in one moment
need not be in another. On the CPU the sum is compared with the peak resident set of the process in
benchmarks/memory_estimate.py. On a GPU the same sum, with the CUDA context in place of the process, has not been
held against a measurement; there, attention keeps no more than on the CPU, but the caching allocator may round up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from whet.backends.device import device_of
from whet.check.rehearsal import Peaks, outline, rehearse
from whet.check.work import Work
from whet.config.model import ModelConfig
from whet.config.run import RunConfig
from whet.engines.local.cache import LENGTH_BLOCK, ROW_BLOCK
from whet.engines.local.pages import PAGE
from whet.methods import Method
from whet.models import adapters
from whet.models.parts import base
from whet.models.shape import cached
from whet.models.source import adapter_base, load_config
from whet.roles import critic_of, frozen_models

MIB = 2**20
PROCESS = 420 * MIB
"""Python, PyTorch, transformers and what they import, with the code and tables that a first step touches: measured
on Linux with CPU builds."""
CUDA_CONTEXT = 600 * MIB
"""What the driver and PyTorch's kernels take of a GPU before the first tensor."""
HEAP_HOLES = 0.25
"""What the C library's heap holds beyond the activations in it: freed blocks between others, too small for the next
micro-batch, whose sizes are others. Measured with glibc as the peak beyond that of runs in which every block is given
back (MALLOC_MMAP_THRESHOLD_=1048576), 0.16 to 0.31 of the activations; without it, runs lie within 6% of the sum of
what is alive."""
ADAPTER_LIBRARY = 55 * MIB
"""peft, and the libraries that it imports."""


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment of a run, in bytes by what it is."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """The moments of a run, and the bytes that the device has for them; None where that is not known."""

    device: str
    moments: tuple[Moment, ...]
    available: int | None

    @property
    def peak(self) -> Moment:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def fits(self) -> bool:
        return self.available is None or self.peak.total <= self.available


@dataclass(frozen=True)
class Held:
    """Bytes of a model: its weights, and of these the trained ones, adapter included; how much of both experts hold,
    and how much of the weights lies outside the layers."""

    weights: float
    trained: float
    experts: float = 0.0
    trained_experts: float = 0.0
    outside: float = 0.0


@dataclass(frozen=True)
class Device:
    """What a run computes on: cpu or cuda, its arithmetic (None: float32 throughout), and the bytes it has."""

    type: str
    autocast: torch.dtype | None
    available: int | None


def this_device(config: RunConfig) -> Device:
    """The device of a run that begins here and now."""
    placed, autocast = device_of(config.backend)
    given = config.backend.memory_gb
    return Device(placed.type, autocast, available_bytes(placed.type) if given is None else int(given * 1e9))


def estimate(
    config: RunConfig,
    method: Method,
    work: Work,
    on: Device | None = None,
    config_of: Callable[[ModelConfig], PreTrainedConfig] = load_config,
) -> Estimate:
    """The memory that training takes on one device, that of this machine if none is given, for the largest
    micro-batch of its data. `config_of` reads the configuration of a model.

    Raises what a model's code raises that cannot run without content.
    """
    on = on or this_device(config)
    device, autocast = on.type, on.autocast
    settings = config_of(adapter_base(config.model) or config.model)
    model = outline(config.model, settings)
    held = held_by(model, config.model)
    static = {
        "process": CUDA_CONTEXT if device == "cuda" else PROCESS + ADAPTER_LIBRARY * adapters.has_adapter(model),
        "weights": held.weights,
        "frozen models": sum(held_by(outline(cfg, config_of(cfg)), cfg).weights for cfg in beside(config, method)),
        "optimizer": 2 * held.trained,  # the two moments of AdamW, in the type of the weights
    }
    how = {
        "autocast": autocast,
        "checkpointing": config.backend.activation_checkpointing,
        "chunk_mb": config.backend.head_chunk_mb,
    }
    peaks = rehearse(config.model, settings, work.micro, **how)
    held_too = {
        "kept prefixes": config.engine.kept_mb(has_env=config.env is not None) * 2**20,
        "packed weights": held.weights if device == "cpu" and config.engine.packed_weights else 0.0,
    }
    if work.decoded:
        held_too |= sampling(settings, work, autocast, config)
    if work.decoded and config.rollout.mode != "sync":  # sampled with weights of its own while a step trains
        static["engine's weights"] = held.weights
        static["sampling ahead"] = sum(held_too.values())
    if "critic" in method.trains:
        critic = critic_of(config)
        read = config_of(adapter_base(critic) or critic)
        of_critic = held_by(outline(critic, read), critic)
        static["critic"] = of_critic.weights + 2 * of_critic.trained  # with its optimizer
    holes = HEAP_HOLES * peaks.small if device == "cpu" else 0.0
    moments = [*training({**static, "heap": holes}, held, peaks, again=work.micro.again)]
    if "critic" in method.trains:
        own = peaks if config.critic.path is None else rehearse(critic, read, work.micro, **how)
        # What its head of one number keeps is nothing beside that of all words, which is counted here.
        moments += [
            Moment(f"critic: {one.name}", one.parts)
            for one in training({**static, "heap": holes}, of_critic, own, again=work.micro.again)
        ]
    if work.decoded:
        now = {} if "sampling ahead" in static else held_too
        moments.append(Moment("sampling", {**static, "heap": holes, **now}))
    return Estimate(device, tuple(moments), on.available)


def held_by(model: nn.Module, cfg: ModelConfig) -> Held:
    """Bytes of a model made by `outline`, quantised layers in as many bits as they will have."""
    quantised = _quantised_layers(model) if cfg.quantization is not None else set()
    if cfg.quantization is None or adapters.has_adapter(model):
        adapters.freeze(model, cfg.freeze)
    inside = {id(parameter) for layer in adapters.decoder_layers(model) for parameter in layer.parameters()}
    weights = trained = experts = trained_experts = outside = 0.0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if id(parameter) in quantised:
            size = parameter.numel() * _bits(cfg) / 8
        is_expert = ".experts." in name
        weights += size
        trained += size * parameter.requires_grad
        experts += size * is_expert
        trained_experts += size * (is_expert and parameter.requires_grad)
        outside += size * (id(parameter) not in inside)
    return Held(weights, trained, experts, trained_experts, outside)


def _quantised_layers(model: nn.Module) -> set[int]:
    """The weights that bitsandbytes packs: those of linear layers, but not the head's."""
    kept = id(base(model).get_output_embeddings())
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) != kept and "lora_" not in name
    }


def _bits(cfg: ModelConfig) -> float:
    """Bits of a quantised weight with its share of the scales: one per 64 weights, in 32 bits or quantised to 8."""
    assert cfg.quantization is not None, "only quantised weights have bits"
    if cfg.quantization.bits == 8:
        return 8
    return 4 + (8 / 64 + 32 / (64 * 256) if cfg.quantization.double else 32 / 64)


def beside(config: RunConfig, method: Method) -> Iterator[ModelConfig]:
    """The frozen models that stay in memory during training."""
    yield from frozen_models(config, method).values()
    own_copy = "reference" in method.roles and config.reference.path is None and config.model.adapter is None
    if own_copy and not config.reference.precompute:
        yield config.model


def training(static: Mapping[str, float], held: Held, peaks: Peaks, *, again: bool) -> Iterator[Moment]:
    """The two moments that compete: the end of the forward pass, and the end of the backward pass."""
    before = held.trained if again else 0.0
    top = {"gradients": before, "activations": peaks.activations, "logits": peaks.top - peaks.activations - before}
    yield Moment("forward and backward", {**static, **top})
    rest = {"gradients": held.trained, "activations": max(0.0, peaks.rest - held.trained)}
    yield Moment("backward pass", {**static, **rest})


def sampling(
    settings: PreTrainedConfig, work: Work, autocast: torch.dtype | None, config: RunConfig
) -> dict[str, float]:
    """Keys and values of all sequences decoded together, and the logits of their next tokens."""
    text = settings.get_text_config()
    itemsize = (autocast or getattr(torch, config.model.dtype)).itemsize
    length = min(_blocks(work.decoded_length, LENGTH_BLOCK), getattr(text, "max_position_embeddings", 10**9))
    positions = _blocks(work.decoded, ROW_BLOCK) * length
    if config.engine.cache == "paged":  # as if no page were shared, and the one that belongs to nobody
        positions = work.decoded * _blocks(work.decoded_length, PAGE) + PAGE
    layer = cached(text) * positions * itemsize
    # A layer exists twice while the cache grows. Logits exist twice when a prompt's are spread over its group.
    return {"cache": (text.num_hidden_layers + 1) * layer, "logits": 2 * work.decoded * text.vocab_size * 4}


def _blocks(size: int, block: int) -> int:
    return -(-size // block) * block


def shortage(found: Estimate, config: RunConfig) -> str:
    """What to say where the device has too little."""
    peak = found.peak
    largest = ", ".join(
        f"{name} {size / 1e9:.1f}" for name, size in sorted(peak.parts.items(), key=lambda p: -p[1])[:3]
    )
    return (
        f"training needs about {peak.total / 1e9:.1f} GB ({largest}), but {found.device} has "
        f"{(found.available or 0) / 1e9:.1f} GB left. In this order: lower backend.max_tokens_per_device (now "
        f"{config.backend.max_tokens_per_device}); set backend.activation_checkpointing: true; lower data.max_length "
        "or rollout.max_tokens; train an adapter (model.adapter)"
    )


def available_bytes(device: str) -> int | None:
    """What the device has left: free memory of the GPU; of the machine, or of the group that this process is in.

    What this process holds already counts as available, since the estimate counts the whole process.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    found = [size for size in (_free_ram(), _group_limit()) if size is not None]
    return min(found) + _resident() if found else None


def _free_ram() -> int | None:
    lines = _lines(Path("/proc/meminfo"))
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _group_limit() -> int | None:
    """What a container may still take."""
    limit, used = (_lines(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if not limit or not used or not limit[0].isdigit():
        return None
    cached = next(
        (int(line.split()[1]) for line in _lines(Path("/sys/fs/cgroup/memory.stat")) if "inactive_file " in line), 0
    )
    return max(0, int(limit[0]) - int(used[0]) + cached)


def _resident() -> int:
    lines = _lines(Path("/proc/self/statm"))
    return int(lines[0].split()[1]) * os.sysconf("SC_PAGE_SIZE") if lines else 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
