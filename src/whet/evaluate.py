"""Evaluation on held-out rows: the losses of the method, averaged over all rows at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from whet.backends.protocol import Backend, shares_prefixes
from whet.batch import Batch, collate
from whet.config.run import RunConfig
from whet.loop import weighed
from whet.methods import Method
from whet.types import Unit

ROWS_PER_BATCH = 64


def evaluate_rows(
    backend: Backend, rows: Sequence[Unit], method: Method, config: RunConfig, *, per_batch: int = ROWS_PER_BATCH
) -> dict[str, float]:
    """`eval/loss`, `eval/perplexity` and the metrics of the method's losses, over `rows`.

    The numbers are those of one batch of all rows: how they are cut does not matter.
    """
    outputs = frozenset().union(*(term.outputs for term in method.terms))
    totals: dict[str, float] = defaultdict(float)
    masses: dict[str, float] = defaultdict(float)
    # Rows of like length go together, so that no batch is mostly padding where a model needs padded rows.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].samples[0].tokens))
    for start in range(0, len(order), per_batch):
        batch = collate([rows[i] for i in order[start : start + per_batch]], share_prefixes=shares_prefixes(backend))
        out = backend.forward(batch, outputs)
        for name, kind, mean in _means(out, weighed(batch, method, config), method):
            mass = _mass(batch, kind)
            totals[name] += mean * mass
            masses[name] += mass
    metrics = {f"eval/{name}": total / max(masses[name], 1) for name, total in totals.items()}
    if method.terms[0].name == "sft" and not method.terms[0].options.get("label_smoothing"):
        metrics["eval/perplexity"] = math.exp(min(metrics["eval/loss"], 700))
    return metrics


def _means(out: dict, batch: Batch, method: Method) -> list[tuple[str, str, float]]:
    """(name, kind of weights, mean over this batch) of the loss and of each metric."""
    found: list[tuple[str, str, float]] = []
    loss = 0.0
    for term in method.terms:
        values, metrics = term.loss(out, batch, **term.options)
        loss += term.coef * float((values * batch[f"weights/{term.weight}"]).sum())
        found += [
            (name, "token", float((value * batch["weights/token"]).sum()))
            for name, value in metrics.items()
            if term.loss.per == "token" and not name.endswith("_max")
        ]
    return [("loss", method.terms[0].weight, loss), *found]


def _mass(batch: Batch, kind: str) -> float:
    """How much a batch's mean counts among other batches' means."""
    counts = {
        "token": int(batch.loss_mask.sum()),
        "sequence": int((batch.num_trained > 0).sum()),
        "pair": batch.num_units,
    }
    return float(counts.get(kind, batch.num_sequences))
