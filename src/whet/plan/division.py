"""What one device holds of a model's weights, gradients and optimizer, by the backend that divides them."""

from __future__ import annotations

from dataclasses import dataclass

from whet.check.memory import Held
from whet.plan.arrangement import Arrangement
from whet.plan.models import Sized

REDUCED = 5e8
"""Gradients that DeepSpeed puts together in one bucket (`reduce_bucket_size`)."""
LIVE = 1e9
"""Weights that ZeRO-3 keeps gathered at a time (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Divided:
    """Bytes on one device: of a model's weights, gradients and optimizer, and of what is gathered of its weights."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    gathered: float = 0.0


def divided(model: Sized, how: Arrangement, half: bool) -> Divided:
    """What one device holds of a model. `half`: products are made in 16 bits.

    Sources of the layouts: fully sharded (arXiv:2304.11277), ZeRO (arXiv:1910.02054), Megatron (arXiv:2104.04473).
    """
    held = model.held
    # Of weights in few bits nothing is cast: they are gathered, and multiplied, as they are.
    narrow = 1.0 if model.cfg.quantization is not None else (2 if half else 4) / model.itemsize
    single = 4 / model.itemsize
    if how.backend == "fsdp":
        return _fully_sharded(held, how, model.text.num_hidden_layers, narrow)
    if how.backend == "deepspeed":
        return _zero(held, how, narrow, single, half)
    if how.backend == "megatron":
        return _megatron(held, how, narrow, single, half)
    return Divided(held.weights, held.trained, 2 * held.trained)


def _fully_sharded(held: Held, how: Arrangement, layers: int, narrow: float) -> Divided:
    """Everything over all devices; a layer is gathered, in 16 bits, while it is computed and the next one with it."""

    def spread(whole: float, of_experts: float) -> float:
        return (whole - of_experts) / (how.tensor * how.shards) + of_experts / how.shards

    inside = held.weights - held.outside - held.experts
    layer = narrow * (inside / how.tensor + held.experts / how.expert) / layers
    gathered = narrow * held.outside / how.tensor + layer * (2 if how.reshard else layers)
    reduced = layer * held.trained / max(held.weights, 1.0)  # a layer's gradients before they are divided
    moves = how.shards > 1 or how.offload == "all"
    weights, trained = spread(held.weights, held.experts), spread(held.trained, held.trained_experts)
    return Divided(
        weights=0.0 if how.offload == "all" else weights,
        gradients=0.0 if how.offload == "all" else trained,
        optimizer=2 * trained if how.offload == "none" else 0.0,
        gathered=gathered + reduced if moves else 0.0,
    )


def _zero(held: Held, how: Arrangement, narrow: float, single: float, half: bool) -> Divided:
    size, itemsize = how.devices, 2 if half else 4
    weights, gradients = held.weights * narrow, held.trained * narrow
    master = held.trained * single if half else 0.0
    whole_weights = 0.0 if how.offload == "all" else weights / size
    return Divided(
        weights=whole_weights if how.zero_stage == 3 else weights,
        gradients=gradients if how.zero_stage == 1 else gradients / size + min(REDUCED * itemsize, gradients),
        optimizer=(2 * held.trained * single + master) / size if how.offload == "none" else 0.0,
        gathered=min(LIVE * itemsize, weights) if how.zero_stage == 3 and size > 1 else 0.0,
    )


def _megatron(held: Held, how: Arrangement, narrow: float, single: float, half: bool) -> Divided:
    """Gradients are summed in float32; the optimizer, master weights included, is divided over all devices."""

    def share(whole: float, of_experts: float, outside: float) -> float:
        """Layers are divided over the pipeline; its first stage has the embedding besides, its last the head."""
        layers = (whole - outside - of_experts) / how.tensor + of_experts / (how.expert * how.expert_tensor)
        return layers / how.pipeline + outside / how.tensor / min(2, how.pipeline)

    trained_outside = held.outside * held.trained / max(held.weights, 1.0)
    return Divided(
        weights=narrow * share(held.weights, held.experts, held.outside),
        gradients=single * share(held.trained, held.trained_experts, trained_outside),
        optimizer=(3 if half else 2) * held.trained * single / how.devices if how.offload == "none" else 0.0,
    )
