"""Batches: what collate writes, how units are cut apart, and what each value weighs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whet.batch import Batch, collate, weights
from whet.errors import DataError
from whet.types import Sample, Unit


def sample(tokens: list[int], trained: int, reward: float | None = None) -> Sample:
    """A sample of which the last `trained` tokens are trained; its sampler logprobs are minus its tokens."""
    mask = [i >= len(tokens) - trained for i in range(len(tokens))]
    return Sample(tokens, mask, [-float(t) for t in tokens], reward)


def groups() -> list[Unit]:
    """Three units of 2, 1 and 3 sequences with lengths 4 5 | 3 | 2 6 4, trained 2 3 | 0 | 1 2 2."""
    return [
        Unit("a", (sample([1, 2, 3, 4], 2, 0.5), sample([1, 2, 5, 6, 7], 3, 1.0))),
        Unit("b", (sample([8, 9, 10], 0, 2.0),)),
        Unit(
            "c", (sample([11, 12], 1, 3.0), sample([11, 12, 13, 14, 15, 16], 2, 4.0), sample([17, 18, 19, 20], 2, 5.0))
        ),
    ]


def of_sizes(sizes: list[int]) -> Batch:
    """One unit of one sequence per size, tokens all different."""
    tokens = itertools.count()
    return collate([Unit(str(i), (sample([next(tokens) for _ in range(n)], 1),)) for i, n in enumerate(sizes)])


def test_collate_lays_sequences_end_to_end_with_all_that_is_known_of_them():
    batch = collate(groups())
    assert (batch.num_tokens, batch.num_sequences, batch.num_units) == (24, 6, 3)
    assert batch.tokens.tolist() == [
        1,
        2,
        3,
        4,
        1,
        2,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
        12,
        11,
        12,
        13,
        14,
        15,
        16,
        17,
        18,
        19,
        20,
    ]
    assert batch.position_ids.tolist() == [*range(4), *range(5), *range(3), *range(2), *range(6), *range(4)]
    assert batch.cu_seqlens.tolist() == [0, 4, 9, 12, 14, 20, 24] and batch.cu_seqlens.dtype == torch.int32
    assert batch.lengths.tolist() == [4, 5, 3, 2, 6, 4]
    assert batch.unit_ids.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.unit_names == ("a", "b", "c")
    assert batch.num_trained.tolist() == [2, 3, 0, 1, 2, 2]
    assert batch["rewards"].tolist() == [0.5, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert batch["sampler_logprobs"].tolist() == [-float(t) for t in batch.tokens.tolist()]


def test_the_first_token_of_a_sequence_is_never_trained_since_nothing_predicts_it():
    batch = collate([Unit("a", (Sample([1, 2, 3], [True] * 3), Sample([4], [True])))])
    assert batch.loss_mask.tolist() == [False, True, True, False]


@pytest.mark.parametrize("share", [True, False])
def test_the_tree_leads_from_every_logical_token_to_itself(share: bool):
    units = [Unit("a", (sample([*range(40), 1], 1), sample([*range(40), 2], 1))), Unit("b", (sample([3, 4], 1),))]
    batch = collate(units, share_prefixes=share)
    assert batch.tree.tokens[batch.tree.index].tolist() == batch.tokens.tolist()
    assert batch.tree.position_ids[batch.tree.index].tolist() == batch.position_ids.tolist()
    assert batch.tree.num_tokens == (40 + 1 + 1 + 2 if share else 41 + 41 + 2)


def test_a_column_that_only_some_samples_carry_is_refused():
    units = [Unit("a", (sample([1, 2], 1, reward=0.0), sample([1, 3], 1)))]
    with pytest.raises(DataError, match="1 of 2 samples carry reward"):
        collate(units)


def test_a_reward_of_zero_counts_as_a_reward():
    assert collate([Unit("a", (sample([1, 2], 1, reward=0.0),))])["rewards"].tolist() == [0.0]


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(KeyError, match=r"no column 'advantages'; it has \['rewards', 'sampler_logprobs'\]"):
        collate(groups())["advantages"]


def test_sums_and_means_run_over_the_trained_tokens_of_each_sequence():
    batch = collate(groups())
    values = torch.arange(24.0)
    # trained places: 2 3 | 6 7 8 | - | 13 | 18 19 | 22 23
    assert batch.sum_tokens(values).tolist() == [5, 21, 0, 13, 37, 45]
    assert batch.mean_tokens(values).tolist() == [2.5, 7, 0, 13, 18.5, 22.5]
    assert batch.sum_tokens(torch.where(batch.loss_mask, values, torch.nan)).isfinite().all()


@pytest.mark.parametrize("order", [[0], [2, 0], [1, 2, 0], [2, 1]])
def test_selected_units_keep_their_columns_in_the_order_asked_for(order: list[int]):
    batch = collate(groups())
    batch = batch.with_columns(advantages=torch.arange(24.0), scores=torch.arange(6.0)).weighed(
        ["token", "row", "pair"]
    )
    picked = batch.select(order)
    fresh = collate([groups()[u] for u in order])
    for name in ("tokens", "position_ids", "cu_seqlens", "loss_mask", "unit_ids"):
        assert torch.equal(getattr(picked, name), getattr(fresh, name)), name
        assert getattr(picked, name).dtype == getattr(fresh, name).dtype, name
    assert picked.unit_names == fresh.unit_names
    assert np.array_equal(picked.tree.index, fresh.tree.index)
    assert torch.equal(picked["rewards"], fresh["rewards"])
    assert torch.equal(picked["sampler_logprobs"], fresh["sampler_logprobs"])
    tokens = [range(0, 9), range(9, 12), range(12, 24)]
    sequences = [range(0, 2), range(2, 3), range(3, 6)]
    assert picked["advantages"].tolist() == [t for u in order for t in tokens[u]]
    assert picked["scores"].tolist() == [s for u in order for s in sequences[u]]
    # Weights are those of the global batch: 10 trained tokens, 6 rows, 3 units.
    assert torch.equal(picked["weights/token"], picked.loss_mask / 10)
    assert picked["weights/row"].tolist() == pytest.approx([1 / 6] * picked.num_sequences)
    assert picked["weights/pair"].tolist() == pytest.approx([1 / 3] * len(order))


@pytest.mark.parametrize(
    ("units", "parts", "expected"), [(5, 2, [3, 2]), (6, 3, [2, 2, 2]), (4, 4, [1] * 4), (3, 1, [3])]
)
def test_split_cuts_consecutive_units_as_evenly_as_can_be(units: int, parts: int, expected: list[int]):
    minibatches = of_sizes([4] * units).split(parts)
    assert [m.num_units for m in minibatches] == expected
    assert [name for m in minibatches for name in m.unit_names] == [str(u) for u in range(units)]


def test_more_optimizer_steps_than_units_are_refused():
    with pytest.raises(DataError, match="batch of 2 units cannot be split over 3 optimizer steps"):
        of_sizes([4, 4]).split(3)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    max_tokens=st.integers(1, 100),
    max_units=st.none() | st.integers(1, 8),
)
def test_every_unit_is_in_one_micro_batch_and_none_is_too_full(
    sizes: list[int], max_tokens: int, max_units: int | None
):
    bins = of_sizes(sizes).micro_batches(max_tokens, max_units)
    assert sorted(unit for units in bins for unit in units) == list(range(len(sizes)))
    for units in bins:
        assert len(units) == 1 or sum(sizes[u] for u in units) <= max_tokens
        assert len(units) <= (max_units or len(sizes))


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), max_tokens=st.integers(1, 100))
def test_micro_batches_are_few(sizes: list[int], max_tokens: int):
    # Were they filled one after the other, any two neighbours would hold more than one may.
    fitting = [size for size in sizes if size <= max_tokens]
    few = len(sizes) - len(fitting) + 2 * -(-sum(fitting) // max_tokens)
    assert len(of_sizes(sizes).micro_batches(max_tokens)) <= few


def test_a_unit_longer_than_the_limit_stands_alone():
    bins = of_sizes([3, 50, 4, 60]).micro_batches(10)
    assert bins == [[1], [3], [0, 2]]


def test_micro_batches_are_evenly_filled():
    # Longest first into the emptier of two: 5 | 4, then 4 + 3, 5 + 3 and 7 + 3 make 8 and 10 of 18 tokens.
    assert of_sizes([3, 5, 3, 4, 3]).micro_batches(10) == [[1, 2], [0, 3, 4]]
    assert sorted(map(len, of_sizes([6] * 8).micro_batches(36))) == [4, 4], "not 6 and 2"


def test_micro_batches_count_a_shared_prefix_once():
    prompt = list(range(100))
    group = Unit("g", tuple(sample([*prompt, 200 + i], 1) for i in range(8)))
    batch = collate([group, Unit("h", group.samples)])
    assert batch.micro_batches(216) == [[0, 1]]  # 2 * (100 + 8) tokens; laid out in full they would be 1,616
    assert sorted(batch.micro_batches(215)) == [[0], [1]]


def test_most_units_per_micro_batch_can_be_set():
    assert sorted(map(len, of_sizes([2] * 8).micro_batches(1000, 1))) == [1] * 8
    assert sorted(map(len, of_sizes([2] * 8).micro_batches(1000, 3))) == [2, 3, 3]


def test_token_weights_are_one_over_the_trained_tokens():
    batch = collate(groups())
    # 2 + 3 + 0 + 1 + 2 + 2 = 10 trained tokens
    assert torch.equal(weights(batch, "token"), batch.loss_mask / 10)


def test_sequence_weights_are_shared_by_the_sequences_that_are_trained():
    batch = collate(groups())
    # five of six sequences have trained tokens: each weighs 1/5, shared by its 2, 3, 1, 2, 2 tokens
    trained = weights(batch, "sequence")[batch.loss_mask]
    assert trained.tolist() == pytest.approx([1 / 10] * 2 + [1 / 15] * 3 + [1 / 5] + [1 / 10] * 4)


def test_fixed_length_weights_divide_by_the_longest_completion_there_could_be():
    batch = collate(groups())
    # 6 sequences of at most 8 tokens; they need not sum to one
    assert torch.allclose(weights(batch, "fixed_length", max_length=8), batch.loss_mask / 48.0)


def test_row_and_pair_weights_are_one_over_their_number():
    batch = collate(groups())
    assert weights(batch, "row").tolist() == pytest.approx([1 / 6] * 6)
    assert weights(batch, "pair").tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("kind", ["token", "sequence", "row", "pair"])
def test_weights_sum_to_one(kind):
    batch = collate(groups())
    assert weights(batch, kind).sum().item() == pytest.approx(1.0)
    parts = batch.weighed([kind]).split(3)
    assert sum(part[f"weights/{kind}"].sum().item() for part in parts) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["token", "sequence", "fixed_length"])
def test_weights_of_a_batch_without_trained_tokens_are_zero_not_nan(kind):
    batch = collate([Unit("a", (sample([1, 2, 3], 0), sample([4, 5], 0)))])
    assert weights(batch, kind, max_length=4).tolist() == [0.0] * 5


def test_a_unit_larger_than_a_micro_batch_is_cut_between_its_rows():
    prompt = list(range(40))
    rows = [[*prompt, *range(100 * i, 100 * i + 10)] for i in range(1, 6)]
    group = Unit("g", tuple(sample(row, 10) for row in rows), {"baseline_rewards": 0.5})
    single = Unit("s", (sample([7, 8, 9], 1),), {"baseline_rewards": 0.25})
    batch = collate([group, single]).weighed(["token"])
    assert [one.num_tokens for one in batch.trees] == [90, 3]
    cut = batch.refined(70)  # the prompt and three answers
    assert [one.num_tokens for one in cut.trees] == [70, 60, 3]
    assert cut.unit_names == ("g", "g", "s") and cut.unit_ids.tolist() == [0, 0, 0, 1, 1, 2]
    assert cut["baseline_rewards"].tolist() == [0.5, 0.5, 0.25]
    assert torch.equal(cut.tokens, batch.tokens) and torch.equal(cut["weights/token"], batch["weights/token"])
    for part, own in zip(range(3), cut.trees, strict=True):
        assert np.array_equal(own.tokens[own.index], cut.select([part]).tokens.numpy())
    assert [one.num_tokens for one in batch.refined(5).trees] == [50] * 5 + [3]
    assert batch.refined(90) is batch


def test_rows_laid_out_in_full_are_cut_as_such():
    group = Unit("g", tuple(sample([*range(30), i], 1) for i in range(4)))
    cut = collate([group], share_prefixes=False).refined(62)
    assert [one.num_tokens for one in cut.trees] == [62, 62]
