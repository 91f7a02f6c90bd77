"""How long a step takes, from a roofline: peaks of the hardware, and the share of them that is usually reached."""

from __future__ import annotations

from dataclasses import dataclass

from whet.config.run import RunConfig
from whet.hardware import NETWORK, Machines
from whet.methods import Method
from whet.models.shape import experts
from whet.plan.arrangement import Arrangement
from whet.plan.division import divided
from whet.plan.load import Load
from whet.plan.memory import in_half
from whet.plan.models import Models, Sized
from whet.plan.serving import cache_parts, concurrent, token_bytes, weight_bytes

TRAINING = 0.40
"""Share of the peak FLOP/s that forward and backward passes reach (model FLOPs, without what is computed again)."""
TRAINING_EXPERTS = 0.25
"""The same where tokens are sent to experts."""
FORWARD = 0.45
"""The same of forward passes alone."""
PREFILL = 0.45
"""The same of servers that read prompts."""
DECODING = 0.50
"""The same of servers that decode many sequences at a time."""
READING = 0.60
"""Share of the memory's bandwidth that decoding reaches."""
LINK = 0.70
"""Share of a link's bandwidth that collectives reach."""
HOST_LINK = 20e9
"""Bytes per second between a GPU and the memory of its host."""
HOST_ADAM = 1e9
"""Weights per second and GPU that AdamW updates on the host."""
STEP_S = 0.002
"""Seconds of a decoding step beside reading and arithmetic."""
REDUCTION_S = 12e-6
"""Seconds of a small all-reduce within a node."""


@dataclass(frozen=True)
class Speed:
    """Seconds of a step by what takes them, whether sampling and training overlap, and tokens of a step."""

    parts: dict[str, float]
    overlaps: bool
    tokens: float
    concurrent: int

    @property
    def step_s(self) -> float:
        sampling = self.parts.get("sampling", 0.0)
        rest = sum(self.parts.values()) - sampling
        return max(sampling, rest) if self.overlaps else sampling + rest

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


def speed_of(
    config: RunConfig, method: Method, models: Models, how: Arrangement, load: Load, machines: Machines
) -> Speed:
    """The seconds of a step on these machines."""
    half = in_half(config, on_gpu=True)
    peak = machines.gpu.half if half else machines.gpu.single
    parts: dict[str, float] = {}
    decoded = 0
    if load.samples:
        decoded = _together(config, models, how, load, machines)
        parts["sampling"] = _sampling(config, models.policy, how, load, machines, peak, decoded)
    passes = _forward_passes(method, models)
    parts["annotating"] = sum(_forward(one, load) for one in passes) / (how.devices * peak * FORWARD)
    parts["training"] = _training(models.policy, how, load, machines, peak, half, config)
    if models.critic is not None:
        parts["critic"] = _training(models.critic, how, load, machines, peak, half, config)
    if how.engines:
        parts["publishing"] = _publishing(config, models.policy, how, machines)
    overlaps = load.samples and config.rollout.mode != "sync" and not how.colocate and how.engine != "local"
    return Speed({name: seconds for name, seconds in parts.items() if seconds}, overlaps, load.tokens, decoded)


def _forward(model: Sized, load: Load) -> float:
    """FLOPs of a forward pass over a step."""
    counts = model.flops
    return counts.per_token * load.tokens + counts.per_pair * load.pairs + counts.per_looked * load.looks


def _forward_passes(method: Method, models: Models) -> list[Sized]:
    """The models that annotate a step: frozen ones, the policy before its update, its adapter switched off."""
    passes = [*models.frozen, *models.rewards]
    if method.source == "prompts":
        passes.append(models.policy)
    if models.critic is not None:
        passes.append(models.critic)
    if "reference" in method.roles and models.policy.cfg.adapter is not None:
        passes.append(models.policy)
    return passes


def _training(
    model: Sized, how: Arrangement, load: Load, machines: Machines, peak: float, half: bool, config: RunConfig
) -> float:
    """Forward and backward passes, what is sent meanwhile, and the optimizer."""
    total, _ = experts(model.text)
    forward = _forward(model, load)
    operations = forward * (2 + model.flops.trained_share + how.checkpointing) * load.epochs
    computing = operations / (how.devices * peak * (TRAINING if total == 1 else TRAINING_EXPERTS))
    room = config.backend.max_tokens_per_device * how.context
    micros = max(1.0, load.tokens * load.epochs / how.data / max(room, load.tokens / load.units))
    if how.pipeline > 1:
        computing *= 1 + (how.pipeline - 1) / micros
    sent = _sharding_bytes(model, how, half) * micros / (_link(machines, how.shards * how.tensor) * LINK)
    # Weights are gathered while others are computed with; sums between the parts of a matrix hold everything up.
    seconds = max(computing, sent) + _tensor_seconds(model, how, load, machines, half)
    if how.offload != "none":
        own = divided(model, Arrangement(**{**vars(how), "offload": "none"}), half)
        moved = 2 * own.gradients + 2 * own.weights * (how.offload == "all") * micros
        updates = load.updates * load.epochs
        seconds += updates * (moved / HOST_LINK + own.gradients / 4 / HOST_ADAM)
    return seconds


def _sharding_bytes(model: Sized, how: Arrangement, half: bool) -> float:
    """Bytes that a device receives in a micro-batch: weights twice, and its part of the gradients."""
    if how.shards == 1 or how.backend in ("local", "megatron"):
        return 0.0
    itemsize = 2 if half else 4
    count = (model.parameters - model.held.experts / model.itemsize * (1 - 1 / how.expert)) / how.tensor
    trained = count * model.held.trained / max(model.held.weights, 1.0)
    gathers = (2 if how.reshard else 1) if how.backend == "fsdp" or how.zero_stage == 3 else 0
    return (gathers * count + trained) * itemsize * (how.shards - 1) / how.shards


def _tensor_seconds(model: Sized, how: Arrangement, load: Load, machines: Machines, half: bool) -> float:
    """Sums over tensor-parallel devices: two in the forward pass of a layer, two in its backward pass."""
    if how.tensor == 1:
        return 0.0
    tokens = load.tokens * load.epochs / (how.data * how.context)
    passes = 2 * (2 + how.checkpointing)
    volume = tokens * model.text.hidden_size * (2 if half else 4) * model.text.num_hidden_layers / how.pipeline
    return passes * volume * 2 * (how.tensor - 1) / how.tensor / (_link(machines, how.tensor) * LINK)


def _link(machines: Machines, devices: int) -> float:
    return machines.gpu.link if devices <= machines.per_node else min(machines.gpu.link, NETWORK)


def _together(config: RunConfig, models: Models, how: Arrangement, load: Load, machines: Machines) -> int:
    """Sequences that one engine decodes at a time."""
    if how.engines:
        return concurrent(config, models.policy, how, load, machines)
    return min(config.engine.max_concurrent, load.sequences)


def _sampling(
    config: RunConfig, model: Sized, how: Arrangement, load: Load, machines: Machines, peak: float, decoded: int
) -> float:
    """Prompts, then steps in which every sequence gets a token; at the end the longest goes on alone."""
    engines, lengths = max(1, how.engines), load.lengths
    prompts = load.units * lengths.prompt * model.flops.per_token / (engines * how.engine_tensor * peak * PREFILL)
    own = -(-load.sequences // engines)
    waves = max(own / decoded, 1.0) * lengths.response
    full = _decoding_step(config, model, how, load, machines, peak, min(decoded, own))
    alone = _decoding_step(config, model, how, load, machines, peak, 1)
    return prompts + waves * full + max(0, lengths.longest_response - lengths.response) * alone


def _decoding_step(
    config: RunConfig, model: Sized, how: Arrangement, load: Load, machines: Machines, peak: float, sequences: int
) -> float:
    """Seconds of one token for each sequence: weights and caches are read, or products take longer."""
    gpu, tensor, (total, chosen) = machines.gpu, how.engine_tensor, experts(model.text)
    of_experts = 2 * model.held.experts / model.itemsize
    touched = 1 - (1 - chosen / total) ** sequences if total > 1 else 1.0
    weights = weight_bytes(model) - of_experts * (1 - touched)
    length = load.lengths.prompt + load.lengths.response / 2
    caches = sequences * length * token_bytes(model) / cache_parts(config, model, how)
    reading = (weights / tensor + caches) / (gpu.bandwidth * READING)
    operations = sequences * (model.flops.per_token + model.flops.per_looked + model.flops.per_pair * length)
    sums = 2 * model.text.num_hidden_layers * REDUCTION_S if tensor > 1 else 0.0
    return max(reading, operations / (tensor * peak * DECODING)) + STEP_S + sums


def _publishing(config: RunConfig, model: Sized, how: Arrangement, machines: Machines) -> float:
    """Weights, or the adapter, gathered from where they are divided and sent to the engines."""
    publish = config.engine.publish
    alone = model.cfg.adapter is not None and publish.adapter_only is not False
    size = 2.0 * model.held.trained / model.itemsize if alone else weight_bytes(model)
    link = _link(machines, how.devices if how.colocate else how.total) * LINK
    gathered = size / link if how.shards * how.tensor * how.pipeline > 1 else 0.0
    sent = 0.0 if how.colocate else size / (HOST_LINK / 4 if publish.by == "file" else link)
    return gathered + sent
