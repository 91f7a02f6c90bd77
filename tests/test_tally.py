"""Tally: parts of a global batch add up to what the whole would have given."""

from __future__ import annotations

import math

import pytest
import torch

from whet.batch import collate
from whet.losses import loss
from whet.methods import Term
from whet.tally import Tally, reduction, weight_keys
from whet.types import Sample, Unit


@loss(outputs=("logprobs",), per="sequence")
def judged(out, batch):
    """A loss per row: the label; and metrics over parts of the rows."""
    labels = batch["labels"]
    nowhere = torch.full_like(labels, torch.nan)
    chosen = torch.where(labels == 1, out["rewards"], torch.nan)
    return labels * 2.0, {"chosen": chosen, "nowhere": nowhere, "min_reward": out["rewards"], "max_reward": chosen}


def rows(*labels: float):
    units = [
        Unit(str(i), (Sample([1, 2, 3], [False, True, True], columns={"labels": v}),)) for i, v in enumerate(labels)
    ]
    return collate(units)


TERM = Term("judged", judged, "row", coef=0.5)


def test_a_metric_counts_only_where_it_applies():
    batch = rows(1, 0, 1, 0).weighed(weight_keys([TERM]))
    rewards = torch.tensor([4.0, -8.0, 1.0, 7.0])
    whole, parts = Tally([TERM]), Tally([TERM])
    whole.add({"rewards": rewards}, batch)
    for units in ([0, 1], [2], [3]):
        parts.add({"rewards": rewards[units]}, batch.select(units))
    expected = {"loss": 0.5 * 2 * 2 / 4, "chosen": 2.5, "min_reward": -8.0, "max_reward": 4.0}
    assert whole.finish() == pytest.approx(expected)
    assert parts.finish() == pytest.approx(expected)


def test_batches_with_weights_of_their_own_count_by_their_mass():
    tally = Tally([TERM], mass=lambda batch, key: float(batch.num_sequences))
    for labels, rewards in (((1, 1, 0), [1.0, 2.0, 0.0]), ((1,), [6.0])):
        tally.add({"rewards": torch.tensor(rewards)}, rows(*labels).weighed(weight_keys([TERM])))
    # loss: (2 + 2 + 0 + 2) / 4 times the coefficient; chosen: (1 + 2 + 6) / 3.
    assert tally.finish() == pytest.approx({"loss": 0.75, "chosen": 3.0, "min_reward": 0.0, "max_reward": 6.0})


def test_terms_over_different_parts_of_a_batch_each_have_their_own_mean():
    @loss()
    def constant(out, batch):
        return torch.full((batch.num_tokens,), 3.0), {}

    terms = [TERM, Term("nll", constant, "token", coef=2.0, on="chosen")]
    batch = rows(1, 0, 0).weighed(weight_keys(terms))
    assert batch["weights/token/chosen"].tolist() == [0, 0.5, 0.5, 0, 0, 0, 0, 0, 0]
    tally = Tally(terms)
    tally.add({"rewards": torch.zeros(3)}, batch)
    found = tally.finish()
    assert (found["judged_loss"], found["nll_loss"]) == (pytest.approx(2 / 3), pytest.approx(3.0))
    assert found["loss"] == pytest.approx(0.5 * 2 / 3 + 2.0 * 3)


def test_a_loss_that_is_not_finite_is_reported_with_its_units():
    tally = Tally([TERM])
    batch = rows(math.inf, 0).weighed(weight_keys([TERM]))
    tally.add({"rewards": torch.zeros(2)}, batch)
    assert not math.isfinite(tally.finish()["loss"])
    assert tally.losses[0][0] == ("0", "1")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("ratio_max", "max"),
        ("max_reward", "max"),
        ("eval/max_reward", "max"),
        ("min_reward", "min"),
        ("margin", "mean"),
        ("rewards/margins", "mean"),
        ("minimal", "mean"),
    ],
)
def test_reductions_follow_names(name, how):
    assert reduction(name) == how
