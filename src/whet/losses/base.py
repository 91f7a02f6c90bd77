"""What a loss is: a function that returns one value per token, sequence or pair, and never a mean.

    @loss(reads=("advantages",))
    def my_loss(out, batch, *, cap: float = 5.0):
        return -batch["advantages"] * out["logprobs"].clamp(min=-cap), {}

Its keyword-only parameters are its configuration. Which weights turn the values into one number is the
batch's business (`whet.batch.weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast, runtime_checkable

from torch import Tensor

from whet.batch import Batch

Per = Literal["token", "sequence", "pair"]
Outputs = Mapping[str, Tensor]
"""What the model computed for a batch: `logprobs`, `entropy`, `mean_logprobs`, `correct` and `values` are [T],
0 where a token is not trained; `scores` is [N]."""
Metrics = dict[str, Tensor]
"""Quantities to report, shaped like the loss's values and averaged over the global batch without coefficient; a name
that ends in `_max` is reduced by maximum instead."""


@runtime_checkable
class Loss(Protocol):
    """A loss function with its declarations."""

    outputs: frozenset[str]
    """Model outputs that it needs."""
    outputs_if: Mapping[str, frozenset[str]]
    """Model outputs that it needs when an option is truthy."""
    reads: frozenset[str]
    """Batch columns that must be there."""
    per: Per
    """What one value stands for."""

    def __call__(self, out: Outputs, batch: Batch, **options) -> tuple[Tensor, Metrics]: ...


def loss(
    *,
    outputs: Sequence[str] = ("logprobs",),
    outputs_if: Mapping[str, Sequence[str]] | None = None,
    reads: Sequence[str] = (),
    per: Per = "token",
) -> Callable[[Callable[..., tuple[Tensor, Metrics]]], Loss]:
    """Declare what a loss function needs; see `Loss`."""

    def declare(function: Callable[..., tuple[Tensor, Metrics]]) -> Loss:
        declared = cast(Any, function)
        declared.outputs = frozenset(outputs)
        declared.outputs_if = {option: frozenset(names) for option, names in (outputs_if or {}).items()}
        declared.reads = frozenset(reads)
        declared.per = per
        return declared

    return declare
