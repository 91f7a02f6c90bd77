"""What a credit rule is: a function from a batch with rewards to the same batch with advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from whet.batch import Batch


@runtime_checkable
class Credit(Protocol):
    """A credit rule with its declarations. Its keyword-only parameters are its configuration."""

    reads: frozenset[str]
    writes: frozenset[str]
    min_group: int
    """The smallest group in which the rule can tell better from worse."""
    whitened: bool
    """Whether its advantages are meant to be whitened over the global batch (see `whet.credit.whiten`)."""

    def __call__(self, batch: Batch, **options) -> Batch: ...


def credit(
    *,
    reads: Sequence[str] = ("rewards",),
    writes: Sequence[str] = ("advantages",),
    min_group: int = 1,
    whitened: bool = False,
) -> Callable[[Callable[..., Batch]], Credit]:
    """Declare what a credit rule needs; see `Credit`."""

    def declare(function: Callable[..., Batch]) -> Credit:
        declared = cast(Any, function)
        declared.reads, declared.writes, declared.min_group = frozenset(reads), frozenset(writes), min_group
        declared.whitened = whitened
        return declared

    return declare
