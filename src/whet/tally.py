"""Tally: losses and metrics added up over the parts of a global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whet.batch import Batch, WeightKind, weight_key
from whet.losses.base import Outputs
from whet.methods import Term

METRIC_WEIGHTS: dict[str, WeightKind] = {"token": "token", "sequence": "row", "pair": "pair"}
"""What a metric is averaged with, by what its loss is per."""

Mass = Callable[[Batch, str], float]
"""How much a batch whose weights sum to one by themselves counts among others, by the key of the weights."""


def reduction(name: str) -> str:
    """`min` or `max` for metrics whose name says so, else `mean`."""
    last = name.rpartition("/")[2]
    if last.startswith("max_") or last.endswith("_max"):
        return "max"
    return "min" if last.startswith("min_") else "mean"


def metric_key(term: Term) -> str:
    """Key of the weights that a term's metrics are averaged with."""
    return weight_key(METRIC_WEIGHTS[term.loss.per], term.on)


def weight_keys(terms: Iterable[Term]) -> list[str]:
    """Which weights a batch needs for these terms and their metrics."""
    return sorted({key for term in terms for key in (term.weight_key, metric_key(term))})


def divisible(batch: Batch, terms: Iterable[Term], max_tokens: int) -> Batch:
    """A weighed batch, with units that are larger than a micro-batch cut between their rows, unless a term is about
    pairs, which stay together."""
    return batch if any(term.loss.per == "pair" for term in terms) else batch.refined(max_tokens)


class Tally:
    """Sums that stay on their device until `finish` reads them all at once.

    Parts of one global batch share weights that sum to one over all of them. Where each part has weights of its own,
    as in evaluation, `mass` says how much it counts. A metric that is NaN in a place does not apply there: its mean
    goes over the other places.
    """

    def __init__(self, terms: Sequence[Term], mass: Mass | None = None) -> None:
        self.terms, self.mass = terms, mass
        self.parts: list[Tensor] = [torch.zeros((), dtype=torch.float64) for _ in terms]
        self.masses = [0.0 for _ in terms]
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.losses: list[tuple[tuple[str, ...], Tensor]] = []

    def add(self, out: Outputs, batch: Batch) -> Tensor:
        """The loss of one part; everything else is taken note of."""
        loss = torch.zeros((), device=batch.tokens.device)
        for i, term in enumerate(self.terms):
            values, metrics = term.loss(out, batch, **term.options)
            part = (values * batch[f"weights/{term.weight_key}"]).sum()
            loss = loss + term.coef * part
            mass = self._mass(batch, term.weight_key)
            self.parts[i] = self.parts[i].to(part.device) + part.detach().double() * mass
            self.masses[i] += mass
            key = metric_key(term)
            for name, value in metrics.items():
                self._note(name, value.detach().float(), batch[f"weights/{key}"], self._mass(batch, key))
        self.losses.append((batch.unit_names, loss.detach()))
        return loss

    def state(self) -> dict[str, Any]:
        """What was added up, on the CPU, for `absorb` in another process."""
        losses = [(names, loss.cpu()) for names, loss in self.losses]
        return {
            "parts": [part.cpu() for part in self.parts],
            "masses": self.masses,
            "sums": {name: value.cpu() for name, value in self.sums.items()},
            "counts": {name: value.cpu() for name, value in self.counts.items()},
            "losses": losses,
        }

    def absorb(self, state: Mapping[str, Any]) -> None:
        """Add what the tally of another part of the same batch holds."""
        self.parts = [own + theirs for own, theirs in zip(self.parts, state["parts"], strict=True)]
        self.masses = [own + theirs for own, theirs in zip(self.masses, state["masses"], strict=True)]
        for name, value in state["sums"].items():
            join = {"mean": torch.add, "max": torch.maximum, "min": torch.minimum}[reduction(name)]
            self.sums[name] = join(self.sums[name], value) if name in self.sums else value
        for name, value in state["counts"].items():
            self.counts[name] = self.counts[name] + value if name in self.counts else value
        self.losses += state["losses"]

    def not_finite(self, loss: float) -> str:
        """Which units a loss that is not finite comes from, and what to do."""
        bad = [name for units, part in self.losses if not torch.isfinite(part) for name in units]
        names = ", ".join(bad[:8]) + (" …" if len(bad) > 8 else "")
        return (
            f"the loss is {loss} in the micro-batch of {names}; nothing was updated. Look at these rows, lower "
            "optim.lr, or use float32 arithmetic (backend.precision)"
        )

    def finish(self) -> dict[str, float]:
        """`loss`, the part of each term where there are several, and the metrics. One that applied nowhere is left
        out."""
        names, counted = list(self.sums), [name for name in self.sums if name in self.counts]
        tensors = [*self.parts, *self.sums.values(), *(self.counts[name] for name in counted)]
        numbers = torch.stack([tensor.double() for tensor in tensors]).tolist()
        parts, sums, counts = (
            numbers[: len(self.parts)],
            dict(zip(names, numbers[len(self.parts) :], strict=False)),
            dict(zip(counted, numbers[len(self.parts) + len(names) :], strict=True)),
        )
        if self.mass is not None:
            parts = [part / mass if mass else 0.0 for part, mass in zip(parts, self.masses, strict=True)]
        result = {"loss": sum(term.coef * part for term, part in zip(self.terms, parts, strict=True))}
        if len(self.terms) > 1:
            result |= {f"{term.name}_loss": part for term, part in zip(self.terms, parts, strict=True)}
        for name, total in sums.items():
            if name not in counts:
                result[name] = total
            elif counts[name] > 0:
                result[name] = total / counts[name]
        return {name: number for name, number in result.items() if abs(number) != float("inf") or name == "loss"}

    def _mass(self, batch: Batch, key: str) -> float:
        return 1.0 if self.mass is None else self.mass(batch, key)

    def _note(self, name: str, value: Tensor, weights: Tensor, mass: float) -> None:
        applies = (weights > 0) & ~value.isnan()
        if (how := reduction(name)) != "mean":
            sign = 1 if how == "max" else -1
            best = sign * torch.where(applies, sign * value, -torch.inf).max()
            join = torch.maximum if how == "max" else torch.minimum
            self.sums[name] = join(self.sums.get(name, best), best)
            return
        total, count = (torch.where(applies, v * weights, 0).sum() * mass for v in (value, torch.ones_like(value)))
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts[name] + count if name in self.counts else count
