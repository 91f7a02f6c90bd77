"""The memory of a server that samples: weights in 16 bits, keys and values, workspace."""

from __future__ import annotations

from whet.config.run import RunConfig
from whet.hardware import GIB, Machines
from whet.models.shape import cached, kv_heads
from whet.plan.arrangement import Arrangement
from whet.plan.load import Load
from whet.plan.models import Sized

WORKSPACE = 3.0 * GIB
"""Captured graphs, activations and buffers of a server beside weights and cache."""
SHARE = 0.88
"""Share of a device's memory that a server takes, where its options do not say."""
ASLEEP = 1.5 * GIB
"""What a sleeping server keeps on its device."""


def token_bytes(model: Sized) -> float:
    """Keys and values of a token in all layers; of latent attention, the vector that they are made from."""
    return 2.0 * model.text.num_hidden_layers * cached(model.text, latent=True)


def weight_bytes(model: Sized) -> float:
    """Bytes of the weights in an engine."""
    return 2.0 * model.parameters


def cache_parts(config: RunConfig, model: Sized, how: Arrangement) -> int:
    """Devices of a server over which a sequence's keys and values, or the sequences, are divided.

    Heads of keys are divided, and repeated where there are fewer of them than devices; a latent vector has no heads,
    so that every device has all of it unless each serves sequences of its own (SGLang's `enable_dp_attention`).
    """
    options = {name.replace("-", "_"): value for name, value in config.engine.options.items()}
    heads = 1 if getattr(model.text, "kv_lora_rank", None) else kv_heads(model.text)
    apart = int(options.get("dp_size", 1)) if options.get("enable_dp_attention") else 1
    return min(how.engine_tensor, max(heads, apart))


def server_parts(config: RunConfig, model: Sized, how: Arrangement, load: Load, machines: Machines) -> dict[str, float]:
    """Bytes on each device of a server: a cache for all its sequences, or for as many as there is room for."""
    weights = weight_bytes(model) / how.engine_tensor
    longest = load.lengths.longest_prompt + load.lengths.longest_response
    least = longest * token_bytes(model) / cache_parts(config, model, how)  # one sequence of full length, at least
    room = machines.gpu.memory * share_of(config) - weights - WORKSPACE
    return {
        "engine's weights": weights,
        "engine's cache": max(least, min(wanted(config, how, load) * least, room)),
        "engine's workspace": WORKSPACE,
    }


def concurrent(config: RunConfig, model: Sized, how: Arrangement, load: Load, machines: Machines) -> int:
    """Sequences of mean length that one server decodes at a time."""
    cache = server_parts(config, model, how, load, machines)["engine's cache"] * cache_parts(config, model, how)
    sequence = (load.lengths.prompt / load.rows + load.lengths.response) * token_bytes(model)
    return max(1, min(wanted(config, how, load), int(cache / sequence)))


def wanted(config: RunConfig, how: Arrangement, load: Load) -> int:
    """Sequences that each server is asked for at a time, at most."""
    return -(-min(load.sequences, config.engine.max_concurrent) // max(1, how.engines))


def share_of(config: RunConfig) -> float:
    """The share of a device's memory that a server may take."""
    names = ("mem_fraction_static", "gpu_memory_utilization")
    return next((float(v) for k, v in config.engine.options.items() if k.replace("-", "_") in names), SHARE)
