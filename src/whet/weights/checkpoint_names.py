"""A model's parameters as its checkpoints hold them: adapters merged, experts one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from whet.errors import EngineError
from whet.weights.names import in_files

WRAPPED = "base_model.model."


@dataclass(frozen=True, slots=True)
class Naming:
    """What is known of a model beside its parameters: the `model`, which need hold no weights, and the `scales` of its
    adapter by the module that it is on."""

    model: PreTrainedModel
    scales: Mapping[str, float] | None = None


def as_checkpoint(parameters: Iterable[tuple[str, Tensor]], naming: Naming) -> Iterator[tuple[str, Tensor]]:
    """(name as in a checkpoint, tensor) for a pass over a model's own parameters.

    Of a module with an adapter the weight waits until both of its matrices have come by. Raises EngineError for an
    adapter that cannot be merged so.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parameters:
        plain = name.removeprefix(WRAPPED)
        module, part = _adapted(plain)
        if part is None:
            plain = plain.replace(".base_layer.", ".")  # a bias beneath an adapter
            yield from in_files(naming.model, [(plain, tensor)])
            continue
        held = waiting.setdefault(module, {})
        held[part] = tensor.clone()  # it is valid only until the next is asked for
        if len(held) == 3:
            del waiting[module]
            yield f"{module}.weight", _merged(module, held, naming)
    if waiting:
        raise EngineError(
            f"the adapter on {next(iter(waiting))} has parts that cannot be merged into its weight; set "
            "engine.publish.adapter_only: true, or use a plain LoRA"
        )


def adapter_parameters(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The adapter's own tensors of a pass, named as peft saves them."""
    for name, tensor in parameters:
        if ".lora_" in name:
            head, _, tail = name.partition(".lora_")
            matrix, _, rest = tail.partition(".")
            yield f"{head}.lora_{matrix}.{rest.partition('.')[2]}", tensor


def _adapted(name: str) -> tuple[str, str | None]:
    """The module whose adapter or weight beneath one a parameter is, and which; None for any other parameter."""
    for part, sign in (("A", ".lora_A."), ("B", ".lora_B."), ("dora", ".lora_magnitude_vector.")):
        if sign in name:
            return name.partition(sign)[0], part
    if name.endswith(".base_layer.weight"):
        return name.removesuffix(".base_layer.weight"), "weight"
    return name, None


def _merged(module: str, held: Mapping[str, Tensor], naming: Naming) -> Tensor:
    weight = held.get("weight")
    if set(held) != {"weight", "A", "B"} or weight is None or not weight.is_floating_point():
        raise EngineError(
            f"{module} is quantised, or its adapter is no plain LoRA, so it cannot be merged for the engine; set "
            "engine.publish.adapter_only: true where the engine can take adapters"
        )
    scale = (naming.scales or {}).get(module, 1.0)
    return weight + (held["B"].to(weight) @ held["A"].to(weight)) * scale
