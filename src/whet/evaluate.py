"""Evaluation on held-out rows: the losses of the method, averaged over all rows at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from whet.backends.protocol import Backend, shares_prefixes
from whet.batch import Batch, collate
from whet.config.run import RunConfig
from whet.loop import annotated, weighed
from whet.methods import Method
from whet.tally import Tally
from whet.types import Unit

ROWS_PER_BATCH = 64


def evaluate_rows(
    models: Mapping[str, Backend],
    rows: Sequence[Unit],
    method: Method,
    config: RunConfig,
    *,
    per_batch: int = ROWS_PER_BATCH,
    running: dict[str, list[float]] | None = None,
) -> dict[str, float]:
    """`eval/loss` and the metrics of the method's losses, over `rows`; `eval/perplexity` where it has a meaning.

    `models` are by role. The numbers are those of one batch of all rows: how they are cut does not matter, but for
    losses that compare the rows of a batch with each other (kto, bco, aot).
    """
    backend = models["policy"]
    outputs = frozenset().union(*(term.outputs for term in method.terms))
    tally = Tally(method.terms, mass=_mass)
    # Rows of like length go together, so that no batch is mostly padding where a model needs padded rows.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].samples[0].tokens))
    for start in range(0, len(order), per_batch):
        batch = collate([rows[i] for i in order[start : start + per_batch]], share_prefixes=shares_prefixes(backend))
        batch = annotated(batch, method, models, running or {})
        tally.add(backend.forward(batch, outputs), weighed(batch, method, config))
    metrics = {f"eval/{name}": value for name, value in tally.finish().items()}
    if method.terms[0].name == "sft" and not method.terms[0].options.get("label_smoothing"):
        metrics["eval/perplexity"] = math.exp(min(metrics["eval/loss"], 700))
    return metrics


def _mass(batch: Batch, key: str) -> float:
    """How much a batch's mean counts among other batches' means."""
    kind, _, on = key.partition("/")
    part = batch["labels"] == 1 if on == "chosen" else batch.lengths > 0
    if kind == "token":
        return float(batch.num_trained[part].sum())
    if kind == "sequence":
        return float((batch.num_trained[part] > 0).sum())
    return float(batch.num_units if kind == "pair" else part.sum())
