"""Passes over the micro-batches of a batch: outputs put together again, gradients added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from whet.backends.device import Arithmetic
from whet.backends.forward import Forward
from whet.batch import Batch
from whet.losses.base import PER_SEQUENCE, Output
from whet.methods import Term
from whet.tally import Tally

Micros = Iterable[tuple[Sequence[int], Batch]]
"""Micro-batches, each with its units in the batch; none of one that is run for the sake of other ranks alone."""


def forward_pass(
    compute: Forward, arithmetic: Arithmetic, batch: Batch, micros: Micros, outputs: Set[Output]
) -> dict[Any, Tensor]:
    """Outputs over the whole batch, on the batch's device; without a micro-batch of its own a rank has none."""
    results: dict[Any, Tensor] = {}
    with torch.no_grad(), compute.installed():
        for units, micro in micros:
            with arithmetic.context():
                out = compute(micro.to(arithmetic.device), outputs)
            chosen = torch.tensor(units, dtype=torch.long, device=batch.unit_ids.device)
            sequences = torch.isin(batch.unit_ids, chosen)
            for name, values in out.items() if units else ():
                rows = sequences if name in PER_SEQUENCE else sequences[batch.sequence_ids]
                if name not in results:
                    results[name] = values.new_zeros(len(rows), *values.shape[1:]).to(batch.tokens.device)
                results[name][rows] = values.to(results[name].device)
    return results


def backward_pass(
    compute: Forward,
    arithmetic: Arithmetic,
    micros: Micros,
    terms: Sequence[Term],
    backward: Callable[[Tensor], None],
) -> Tally:
    """Run `backward` on the loss of every micro-batch; returns what losses and metrics add up to."""
    tally = Tally(terms)
    outputs = frozenset().union(*(term.outputs for term in terms))
    with compute.installed():
        for units, micro in micros:
            micro = micro.to(arithmetic.device)
            with arithmetic.context():
                out = compute(micro, outputs)
            loss = tally.add(out, micro) if units else _nothing_of(out.values())
            if loss.requires_grad:  # else no token of this micro-batch is trained
                backward(loss)
    return tally


def looked(batch: Batch, outputs: Set[Output]) -> int:
    """Tokens that the language-model head runs on."""
    return 0 if outputs <= {"values", *PER_SEQUENCE} else int(batch.num_trained.sum())


def _nothing_of(values: Iterable[Tensor]) -> Tensor:
    """Zero, from which a backward pass goes the way of every other and finds zeros."""
    return torch.stack([(value * 0).sum() for value in values if value.requires_grad]).sum()
