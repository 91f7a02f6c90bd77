"""A version of the policy's weights, as it is handed from the trainer to the engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the policy's weights are after `version` optimizer steps.

    `tensors()` begins a new pass over (name as in a Hugging Face checkpoint, full tensor), each made as it is asked for
    and valid until the next is: sharded and fused parameters are gathered on the way, never all at once. A pass
    is led by rank 0 and collective over the trainer's ranks, so it runs to its end. `adapter()` does the same for the
    weights of a LoRA adapter alone, named as peft saves them; None where none is trained. A snapshot is valid until
    the next optimizer step.
    """

    version: int
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    adapter: Callable[[], Iterator[tuple[str, Tensor]]] | None = None


def version_of(snapshot: Snapshot | int) -> int:
    """The version of what an engine is handed: an engine in the trainer's own process needs nothing else."""
    return snapshot if isinstance(snapshot, int) else snapshot.version
