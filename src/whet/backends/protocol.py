"""What a training backend offers to the loop."""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from whet.batch import Batch
from whet.losses.base import Output
from whet.methods import Term


@runtime_checkable
class Backend(Protocol):
    """A model, its optimizer, and the arithmetic between them.

    Batches come with their weights (`Batch.weighed`), which sum to one over the global batch; a backend that
    cuts a batch up or spreads it over ranks adds the parts and divides by nothing.
    """

    def forward(self, batch: Batch, outputs: Set[Output]) -> dict[Any, Tensor]:
        """Model outputs (see `whet.losses.base.Outputs`) without gradient, over the whole batch."""
        ...

    def forward_backward(self, batch: Batch, terms: Sequence[Term]) -> dict[str, float]:
        """Add the gradient of sum over terms of coef * sum(values * weights). Returns `loss` and metrics.

        Raises TrainingError naming the units when the loss is not finite; the gradient is then not to be used.
        """
        ...

    def optim_step(self, lr: float) -> dict[str, float]:
        """Clip, update the weights, clear the gradient. Returns `grad_norm` (before clipping)."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights (loadable by transformers or peft) and all state that `load` needs."""
        ...

    def load(self, folder: Path) -> None:
        """Go back to exactly what `save` wrote."""
        ...

    def export_weights(self, folder: Path) -> None:
        """Write the weights alone, in a form that transformers or peft load."""
        ...

    def move_towards(self, other: Backend, share: float) -> None:
        """Make every weight `share` of the other's and the rest of its own (TR-DPO, arXiv:2404.09656)."""
        ...

    def at_temperature(self, temperature: float) -> AbstractContextManager[None]:
        """A context in which logits are divided by this temperature in place of the sampling temperature."""
        ...

    def offload(self) -> None:
        """Free the accelerator for an engine that shares it."""
        ...

    def onload(self) -> None:
        """Take the accelerator back."""
        ...

    def describe(self) -> dict[str, Any]:
        """What was chosen at start-up: device, precision, attention, trainable parameters."""
        ...


def shares_prefixes(backend: Backend) -> bool:
    """Whether batches for this backend are to be collated with shared prefixes: yes, unless it says otherwise."""
    return getattr(backend, "shares_prefixes", True)
