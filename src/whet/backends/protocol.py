"""What a training backend offers to the loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from whet.batch import Batch
from whet.flops import ModelFlops
from whet.losses.base import Output
from whet.methods import Term
from whet.ranks.share import Share


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

    def weights(self, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(name as in `model.named_parameters()`, full tensor) of every parameter, or of those that are trained; each
        is valid until the next is asked for."""
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

    def digest(self) -> str:
        """A hash of what outputs follow from, an adapter left out."""
        ...


class RankBackend(Protocol):
    """What one rank offers of a model that is spread over several; `ranks.led.Led` makes a `Backend` of it.

    Made with `(model: ModelConfig, tokenizer, config: BackendConfig, arithmetic, *, layout: Layout, scores: bool,
    frozen: bool, optim: OptimConfig | None, attention, temperature: float, values: bool)` on all ranks at once, in the
    process group that is there; it loads the model itself, so that no rank need hold more than its part.

    Every method is called on all ranks at once, with the same arguments but for shares. Every share of a batch has as
    many micro-batches as the others, fillers included (see `ranks.share.Share`); a filler runs forward and backward
    like any other, counts for nothing and is left out of the tally. Gradients are *summed* over data ranks, never
    averaged: weights sum to one over the global batch already. Methods not described here are as in `Backend`.
    """

    model: Any
    compute: Any
    counts: ModelFlops
    """What passes of the whole model take."""
    shares_prefixes: bool
    peak_flops: float | None

    def forward(self, share: Share, outputs: Set[Output]) -> tuple[Mapping[Any, Tensor], float]:
        """Outputs over the share's batch, on the CPU, and the floating-point operations of this rank. Outputs count
        on ranks that `Layout.reports`; what others return may be empty."""
        ...

    def forward_backward(self, share: Share, terms: Sequence[Term]) -> tuple[Mapping[str, Any], float]:
        """Add the share's gradient. Returns `Tally.state()` and the operations of this rank."""
        ...

    def optim_step(self, lr: float) -> dict[str, float]: ...

    def set_temperature(self, temperature: float) -> float:
        """Divide logits by this from now on. Returns what they were divided by before."""
        ...

    def save(self, folder: Path) -> None:
        """All ranks write into one folder: the whole model's weights as `export_weights` does, and the optimizer."""
        ...

    def load(self, folder: Path) -> None:
        """Go back to what `save` wrote, whatever the number and layout of the ranks was then."""
        ...

    def export_weights(self, folder: Path) -> None: ...

    def weights(self, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(name as in `model.named_parameters()` of the whole model, full tensor, on rank 0) of every parameter, or of
        those that are trained, gathered one after the other; each is valid until the next is asked for."""
        ...

    def move_towards(self, other: Any, share: float) -> None: ...

    def offload(self) -> None: ...

    def onload(self) -> None: ...

    def describe(self) -> dict[str, Any]: ...


def shares_prefixes(backend: Backend) -> bool:
    """Whether batches for this backend are to be collated with shared prefixes: yes, unless it says otherwise."""
    return getattr(backend, "shares_prefixes", True)
