"""What a loss is: a function that returns one value per token, sequence or pair, and never a mean.

    @loss(reads=("advantages",))
    def my_loss(out, batch, *, cap: float = 5.0):
        return -batch["advantages"] * out["logprobs"].clamp(min=-cap), {}

Its keyword-only parameters are its configuration. Which weights turn the values into one number is the
batch's business (`whet.batch.weights`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast, runtime_checkable

from torch import Tensor

from whet.batch import Batch

Per = Literal["token", "sequence", "pair"]


class Request(Hashable, Protocol):
    """A model output with parameters: a frozen dataclass, such as `whet.losses.distill.Divergence`."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        ...


Output = str | Request
"""A model output that can be asked for."""
PER_SEQUENCE = frozenset({"scores"})
"""Outputs with one value per sequence; the others have one per token."""
Outputs = Mapping[Any, Tensor]
"""What the model computed for a batch, by what was asked for (`Output`): `logprobs`, `entropy`, `mean_logprobs`,
`correct` and `values` are [T], 0 where a token is not trained; `scores` is [N]."""
Asks = Callable[[Mapping[str, Any]], Iterable[Output]]
"""From the options of a loss to model outputs."""
Metrics = dict[str, Tensor]
"""Quantities to report, shaped like the loss's values and averaged over the global batch without coefficient; a name
that ends in `_max` is reduced by maximum instead."""


@runtime_checkable
class Loss(Protocol):
    """A loss function with its declarations."""

    outputs: frozenset[Output]
    """Model outputs that it needs."""
    outputs_if: Mapping[str, frozenset[str]]
    """Model outputs that it needs when an option is truthy."""
    requests: Callable[[Mapping[str, Any]], frozenset[Output]]
    """Model outputs that it needs with these options, which may leave out those that have their default."""
    reads: frozenset[str]
    """Batch columns that must be there."""
    per: Per
    """What one value stands for."""

    def __call__(self, out: Outputs, batch: Batch, **options) -> tuple[Tensor, Metrics]: ...


def loss(
    *,
    outputs: Sequence[str] = ("logprobs",),
    outputs_if: Mapping[str, Sequence[str]] | None = None,
    requests: Asks | None = None,
    reads: Sequence[str] = (),
    per: Per = "token",
) -> Callable[[Callable[..., tuple[Tensor, Metrics]]], Loss]:
    """Declare what a loss function needs; see `Loss`. `requests` is called with all options of the loss."""

    def declare(function: Callable[..., tuple[Tensor, Metrics]]) -> Loss:
        declared = cast(Any, function)
        declared.outputs = frozenset(outputs)
        declared.outputs_if = {option: frozenset(names) for option, names in (outputs_if or {}).items()}
        declared.requests = _requests(requests, defaults(function))
        declared.reads = frozenset(reads)
        declared.per = per
        return declared

    return declare


def needed(loss: Loss, options: Mapping[str, Any]) -> frozenset[Output]:
    """Every model output that a loss needs with these options."""
    extra = [names for option, names in loss.outputs_if.items() if options.get(option)]
    return frozenset[Output](loss.outputs).union(*extra, loss.requests(options))


def defaults(function: Callable[..., object]) -> dict[str, Any]:
    """The options of a loss function that have a default, and that default."""
    options = (one for one in inspect.signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY)
    return {one.name: one.default for one in options if one.default is not one.empty}


def _requests(asks: Asks | None, given: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], frozenset[Output]]:
    def requests(options: Mapping[str, Any]) -> frozenset[Output]:
        return frozenset(asks({**given, **options})) if asks is not None else frozenset()

    return requests
