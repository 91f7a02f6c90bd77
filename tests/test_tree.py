"""The prefix tree: rows come back exactly, every shared prefix stands once, predecessors are right at every depth."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet import tree
from whet.tree import Tree

# Few distinct tokens and short rows, so that prefixes, repeats and rows within rows are common.
row_lists = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)
min_saved = st.sampled_from([1, 2, 5, 16])


def arrays(rows: list[list[int]]) -> list[np.ndarray]:
    return [np.asarray(row) for row in rows]


def rows_of(laid: Tree, lengths: list[int]) -> list[list[int]]:
    bounds = np.cumsum([0, *lengths])
    return [laid.tokens[laid.index[a:b]].tolist() for a, b in pairwise(bounds)]


def depth_of(laid: Tree) -> int:
    return max(len(laid.ancestors(segment)) for segment in range(len(laid.parents))) + 1


def check_structure(laid: Tree, rows: list[list[int]]) -> None:
    """What every tree must satisfy, computed the slow way from the rows."""
    assert rows_of(laid, [len(row) for row in rows]) == rows
    assert laid.starts[0] == 0 and laid.starts[-1] == laid.num_tokens
    assert (np.diff(laid.starts) > 0).all(), "no segment is empty"
    assert (laid.parents < np.arange(len(laid.parents))).all(), "a parent stands before its children"
    assert sorted(set(laid.index.tolist())) == list(range(laid.num_tokens)), "no token stands there for nothing"
    offset = 0
    for row in rows:
        places = laid.index[offset : offset + len(row)]
        assert laid.position_ids[places].tolist() == list(range(len(row)))
        # The place before a token is that of the token before it in the row, and -1 before the first.
        assert laid.predecessors[places].tolist() == [-1, *places[:-1].tolist()]
        # A token sees its segment's ancestors and its own segment: exactly the row up to itself.
        last = int(np.searchsorted(laid.starts, places[-1], side="right")) - 1
        seen = [p for s in [*laid.ancestors(last), last] for p in range(laid.starts[s], laid.starts[s + 1])]
        assert seen[: len(row)] == places.tolist()
        offset += len(row)


@given(rows=row_lists, saved=min_saved)
def test_rows_come_back_from_the_tree(rows: list[list[int]], saved: int):
    check_structure(tree.build(arrays(rows), min_saved=saved), rows)


@given(rows=row_lists)
def test_every_distinct_prefix_stands_once_when_everything_is_shared(rows: list[list[int]]):
    distinct = {tuple(row[: i + 1]) for row in rows for i in range(len(row))}
    assert tree.build(arrays(rows), min_saved=1).num_tokens == len(distinct)


@given(rows=row_lists, saved=min_saved)
def test_sharing_never_costs_tokens_and_sharing_all_costs_fewest(rows: list[list[int]], saved: int):
    laid = tree.build(arrays(rows), min_saved=saved)
    assert laid.num_tokens <= sum(map(len, rows))
    assert tree.build(arrays(rows), min_saved=1).num_tokens <= laid.num_tokens


@given(batches=st.lists(row_lists, min_size=1, max_size=4), saved=min_saved)
@settings(max_examples=50)
def test_trees_side_by_side_keep_their_rows_and_stay_apart(batches: list[list[list[int]]], saved: int):
    joined = tree.join([tree.build(arrays(rows), min_saved=saved) for rows in batches])
    check_structure(joined, [row for rows in batches for row in rows])


@given(rows=row_lists)
def test_the_flat_tree_has_one_segment_per_row(rows: list[list[int]]):
    laid = tree.flat(arrays(rows))
    check_structure(laid, rows)
    assert np.diff(laid.starts).tolist() == [len(row) for row in rows]
    assert (laid.parents == -1).all()


def test_a_prompt_with_branching_turns_is_laid_out_three_segments_deep():
    prompt, turn, other = [1, 2, 3, 4], [5, 6, 7], [8, 9]
    rows = [prompt + turn + [10], prompt + turn + [11, 12], prompt + other]
    laid = tree.build(arrays(rows), min_saved=1)
    # [prompt] -> [turn], [other]; [turn] -> [10], [11 12]
    assert laid.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert laid.starts.tolist() == [0, 4, 7, 9, 10, 12]
    assert laid.parents.tolist() == [-1, 0, 0, 1, 1]
    assert laid.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 7, 7, 8]
    assert laid.predecessors.tolist() == [-1, 0, 1, 2, 3, 4, 5, 3, 7, 6, 6, 10]
    assert depth_of(laid) == 3
    check_structure(laid, rows)


def test_identical_rows_are_one_segment():
    laid = tree.build(arrays([[1, 2, 3]] * 5), min_saved=1)
    assert laid.tokens.tolist() == [1, 2, 3]
    assert laid.index.tolist() == [0, 1, 2] * 5


def test_a_row_that_is_the_prefix_of_another_takes_no_tokens_of_its_own():
    laid = tree.build(arrays([[1, 2], [1, 2, 3, 4]]), min_saved=1)
    assert laid.tokens.tolist() == [1, 2, 3, 4]
    assert laid.parents.tolist() == [-1, 0]
    assert laid.index.tolist() == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("shared", "members", "is_shared"), [(16, 2, True), (15, 2, False), (4, 5, True), (4, 4, False)]
)
def test_a_prefix_is_shared_from_sixteen_saved_tokens_on(shared: int, members: int, is_shared: bool):
    # saved = shared * (members - 1): 16, 15, 16, 12
    rows = [[7] * shared + [member] for member in range(members)]
    laid = tree.build(arrays(rows))
    assert laid.num_tokens == (shared + members if is_shared else members * (shared + 1))


def test_what_is_too_short_to_share_at_the_top_may_be_shared_further_down():
    # Two tokens common to three rows save 4; two of the rows go on together and save 2 + 20 = 22.
    rows = [[1, 2, *[3] * 20, 4], [1, 2, *[3] * 20, 5], [1, 2, 6]]
    laid = tree.build(arrays(rows))
    assert laid.num_tokens == 22 + 1 + 1 + 3
    check_structure(laid, rows)
