"""What is odd about data that can be used: each remark goes to the log as a warning, with what to do."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from whet.data.prepared import Prepared
from whet.data.prompts import Prompts
from whet.methods import Method

logger = logging.getLogger(__name__)

FEW_STOPS = 0.5
"""Share of rows that train a stop token below which a model may not learn to stop."""
MANY_CUTS = 0.05
"""Share of rows cut short above which it is worth a word."""
BALANCE = (1.0, 4 / 3)
"""Where the weight of desirable over undesirable completions should lie (KTO, arXiv:2402.01306, section 4.2)."""


def part(
    name: str,
    rows: Prepared | Prompts,
    method: Method,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
) -> None:
    """Look at one part of the data; `name` is `training` or `held-out`."""
    if isinstance(rows, Prompts):
        return
    if name == "training" and not method.scores:
        _stops(rows, tokenizer, stop_token_ids)
        _balance(rows, method)
    _cuts(name, rows)


def _stops(rows: Prepared, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
    """A model whose stop token is never trained goes on for ever; say so before it is trained."""
    if not stop_token_ids:
        return
    share = rows.share_training_one_of(stop_token_ids)
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(int(i))) for i in stop_token_ids)
    if share == 0:
        logger.warning(
            "no row trains a stop token (%s): the model will not learn to end its answers. Does the chat template "
            "end the assistant's turn with another token?",
            names,
        )
    elif share < FEW_STOPS:
        logger.warning(
            "only %.0f%% of the rows train a stop token (%s): the model may not learn to end its answers; raise "
            "data.max_length, or set data.on_too_long to drop",
            *(100 * share, names),
        )


def _cuts(name: str, rows: Prepared) -> None:
    report = rows.report
    lost = report.truncated + report.dropped
    if lost > MANY_CUTS * report.rows:
        logger.warning(
            "%.1f%% of the %s rows are cut: %s truncated, %s dropped; the longest has %s tokens, raise data.max_length",
            *(100 * lost / report.rows, name, f"{report.truncated:,}", f"{report.dropped:,}", f"{report.longest:,}"),
        )


def _balance(rows: Prepared, method: Method) -> None:
    """Labels that are out of balance, with the weights of the loss taken into account."""
    counts, options = rows.label_counts, method.terms[0].options
    if method.task != "unpaired" or counts is None:
        return
    if not counts.desirable or not counts.undesirable:
        missing = "undesirable" if counts.desirable else "desirable"
        logger.warning("no row is %s, and %s learns from the difference; add some", missing, method.name)
        return
    if "desirable_weight" not in options:
        return
    weighed = options["desirable_weight"] * counts.desirable
    against = options["undesirable_weight"] * counts.undesirable
    low, high = BALANCE
    if not low <= weighed / against <= high:
        more, fewer = ("undesirable", "desirable") if weighed < against else ("desirable", "undesirable")
        ratio = weighed / against
        target = low if ratio < low else high
        heavier = options["desirable_weight"] * target / ratio
        logger.warning(
            "%s desirable and %s undesirable completions weigh %.3g to 1, and a ratio of 1 to 1.33 is recommended: "
            "there are too few %s ones for the %s; set loss.desirable_weight to %.3g",
            *(f"{counts.desirable:,}", f"{counts.undesirable:,}", ratio, fewer, more, heavier),
        )
