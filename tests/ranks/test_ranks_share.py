"""Batches divided over ranks: everything once, evenly, in as many micro-batches on each."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from whet.batch import collate
from whet.ranks.balance import balanced
from whet.ranks.layout import Layout
from whet.ranks.share import shares
from whet.types import Sample, Unit


def units_of(sizes: list[int]) -> list[Unit]:
    rows = [[100 + i] * size for i, size in enumerate(sizes)]
    return [Unit(f"u{i}", (Sample(row, [False] + [True] * (len(row) - 1)),)) for i, row in enumerate(rows)]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 6))
def test_every_cost_goes_to_one_part_and_no_part_is_needlessly_heavy(costs: list[int], parts: int):
    found = balanced(costs, parts)
    assert len(found) == parts
    assert sorted(index for part in found for index in part) == list(range(len(costs)))
    sums = [sum(costs[index] for index in part) for part in found]
    # No part exceeds another by more than one of its members: moving that one would else be better.
    assert not costs or max(sums) - min(sums) <= max(costs)


def test_differencing_finds_what_the_greedy_rule_misses():
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in part) for part in balanced([8, 7, 6, 5, 4], 2)) == [14, 16]
    assert sorted(map(len, balanced([1.0] * 7, 3))) == [2, 2, 3]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=14), st.integers(1, 5), st.integers(8, 60))
def test_shares_hold_every_unit_once_in_as_many_micro_batches(sizes: list[int], parts: int, max_tokens: int):
    batch = collate(units_of(sizes)).weighed(["token"])
    divided = shares(batch, parts, [float(size) for size in sizes], max_tokens)
    assert sorted(unit for units, _ in divided for unit in units) == list(range(len(sizes)))
    assert len({len(share.micro_batches) for _, share in divided}) == 1
    total = 0.0
    for units, share in divided:
        seen = [unit for micro in share.micro_batches for unit in micro]
        assert sorted(seen) == list(range(len(units)))
        for members, micro in share.micros():
            total += float(micro["weights/token"].sum())
            assert micro.tree.num_tokens <= max_tokens or micro.num_units == 1
            names = tuple(batch.unit_names[units[member]] for member in members)
            assert not members or micro.unit_names == names
    assert torch.isclose(torch.tensor(total), torch.tensor(1.0), atol=1e-5)


def test_a_filler_counts_for_nothing():
    batch = collate(units_of([5, 9])).weighed(["token", "row"])
    divided = shares(batch, 3, [5.0, 9.0], 100)
    empty = next(share for units, share in divided if not units)
    assert empty.micro_batches == ((),)
    ((members, micro),) = empty.micros()
    assert members == () and micro.unit_names == ("u0",)
    assert not micro["weights/token"].any() and not micro["weights/row"].any()


def test_the_layout_says_who_shares_what():
    layout = Layout(data=2, tensor=2, pipeline=2)
    assert layout.size == 8
    assert [layout.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [rank for rank in range(8) if layout.reports(rank)] == [4, 6]
    assert str(layout) == "data 2 x tensor 2 x pipeline 2" and str(Layout()) == "1 process"
