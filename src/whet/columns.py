"""Every column a batch can carry: its shape, its type, what it means and who writes it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

Kind = Literal["token", "sequence", "unit"]


@dataclass(frozen=True, slots=True)
class Column:
    """`kind` gives the first dimension: token [T], sequence [N] or unit [U] of the logical batch."""

    name: str
    kind: Kind
    dtype: str
    meaning: str
    writer: str


def _table(*columns: Column) -> dict[str, Column]:
    return {column.name: column for column in columns}


COLUMNS: dict[str, Column] = _table(
    Column("rewards", "sequence", "float32", "the reward function's number for a sequence", "source: rollouts"),
    Column("baseline_rewards", "unit", "float32", "the reward of the greedy completion", "source: rollouts"),
    Column("truncated", "sequence", "float32", "1 where a completion was cut off at its longest", "source: rollouts"),
    Column("rollout_ids", "sequence", "int64", "within its unit, the rollout that it is a part of", "source: rollouts"),
    Column("labels", "sequence", "float32", "1 chosen or desirable, 0 rejected or undesirable", "source: rows"),
    Column("margins", "unit", "float32", "by how much chosen should be ahead of rejected", "source: rows"),
    Column("sampler_logprobs", "token", "float32", "logprob under the engine that sampled", "source: rollouts"),
    Column("old_logprobs", "token", "float32", "the trainer's logprob before this update", "annotate"),
    Column("ref_logprobs", "token", "float32", "logprob under the frozen reference", "annotate"),
    Column("teacher_logprobs", "token", "float32", "logprob under the frozen teacher", "annotate"),
    Column("teacher_hidden", "token", "float32", "[T, H] the teacher's hidden state before each token", "annotate"),
    Column("teacher_topk_ids", "token", "int64", "[T, k] the teacher's likeliest tokens in each place", "annotate"),
    Column("teacher_topk_logprobs", "token", "float32", "[T, k] their logprobs under the teacher", "annotate"),
    Column("kl_baseline", "sequence", "float32", "KTO's z, the same on every row of a batch", "annotate"),
    Column("reward_mean", "sequence", "float32", "running mean of the rewards of earlier steps", "annotate"),
    Column("aot_reference", "unit", "float32", "the reference log-ratio of the same rank in the batch", "annotate"),
    Column("aot_rejected", "unit", "float32", "the rejected log-ratio that the chosen one is matched with", "annotate"),
    Column("aot_chosen", "unit", "float32", "the chosen log-ratio that the rejected one is matched with", "annotate"),
    Column("values", "token", "float32", "the critic's value before this update", "annotate"),
    Column("kl_penalties", "token", "float32", "what the KL penalty takes from the reward of a token", "annotate"),
    Column("scores", "sequence", "float32", "a reward model's score", "annotate"),
    Column("advantages", "token", "float32", "how much better than expected, per token", "credit"),
    Column("returns", "token", "float32", "what the critic should have said", "credit"),
    Column("weights/token", "token", "float32", "1 / trained tokens of the global batch", "Batch.weighed"),
    Column("weights/sequence", "token", "float32", "1 / (sequences x trained tokens of the own)", "Batch.weighed"),
    Column("weights/token/chosen", "token", "float32", "as weights/token, over chosen sequences", "Batch.weighed"),
    Column("weights/sequence/chosen", "token", "float32", "as weights/sequence, over chosen ones", "Batch.weighed"),
    Column("weights/row/chosen", "sequence", "float32", "1 / chosen sequences", "Batch.weighed"),
    Column("weights/fixed_length", "token", "float32", "1 / (sequences x longest completion)", "Batch.weighed"),
    Column("weights/row", "sequence", "float32", "1 / sequences", "Batch.weighed"),
    Column("weights/pair", "unit", "float32", "1 / units", "Batch.weighed"),
)
"""The columns that whet itself writes. `register` adds those of a stage or loss of your own."""


def register(column: Column) -> Column:
    """Make a column of your own known, so that stages and losses may declare that they read or write it."""
    known = COLUMNS.get(column.name)
    if known is not None and known != column:
        raise ValueError(f"column {column.name!r} exists already with another meaning: {known.meaning}")
    COLUMNS[column.name] = column
    return column


def column(name: str) -> Column:
    """The column of this name. Raises KeyError naming the nearest known column."""
    if name not in COLUMNS:
        near = difflib.get_close_matches(name, COLUMNS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "; declare it with whet.columns.register"
        raise KeyError(f"no column {name!r}{hint}")
    return COLUMNS[name]
