"""Which completions become rows: the best is the best, ties go to the first, and none is lost without a reason."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.config.sample import SampleConfig
from whet.sample.journal import Completed
from whet.sample.select import select


def group_of(*scores: float | None, texts: str = "abcdefghij", **given) -> list[Completed]:
    """Completions with these scores and texts, by index."""
    return [Completed(i, texts[i], score, "completed", 3, **given) for i, score in enumerate(scores)]


def indices(group: list[Completed], **settings) -> tuple[list[tuple[int, ...]], Counter[str]]:
    chosen = select(group, SampleConfig(**settings))
    return [tuple(one.index for one in taken) for taken in chosen.taken], chosen.dropped


def test_the_best_is_taken_and_of_equals_the_first():
    assert indices(group_of(0.0, 2.0, 1.0, 2.0)) == ([(1,)], {"not among the best": 3})
    assert indices(group_of(0.0, 2.0, 1.0, 2.0), keep=3)[0] == [(1,), (3,), (2,)]


def test_what_scores_too_little_is_no_example():
    assert indices(group_of(0.0, 0.5), min_score=0.6) == ([], {"score below min_score": 2})
    assert indices(group_of(0.0, 0.6), min_score=0.6) == ([(1,)], {"score below min_score": 1})
    assert indices(group_of(0.7, 0.5, 0.9), select="all", min_score=0.6)[0] == [(0,), (2,)]


def test_a_pair_is_the_best_against_the_worst():
    assert indices(group_of(1.0, 0.0, 3.0, -1.0), select="pairs") == ([(2, 3)], {"not among the best and worst": 2})
    assert indices(group_of(1.0, 0.0, 3.0, -1.0), select="pairs", keep=5)[0] == [(2, 3), (0, 1)]
    # Of three, the one in the middle is left over: nothing is better than itself.
    assert indices(group_of(1.0, 0.0, 3.0), select="pairs", keep=5) == ([(2, 1)], {"not among the best and worst": 1})


@pytest.mark.parametrize(
    "scores,settings,taken,reason",
    [
        ((1.0, 1.0, 1.0), {}, [], "equal scores"),
        ((1.0, 0.5), {"min_gap": 0.6}, [], "scores too near"),
        ((1.0, 0.5), {"min_gap": 0.5}, [(0, 1)], None),
        ((1.0, 0.5), {"min_score": 2.0}, [], "score below min_score"),
        ((1.0,), {}, [], "nothing to compare with"),
    ],
)
def test_no_pair_is_made_where_nothing_tells_the_two_apart(scores, settings, taken, reason):
    found, dropped = indices(group_of(*scores), select="pairs", **settings)
    assert found == taken and list(dropped) == ([reason] if reason else [])


def test_labels_take_every_completion_that_can_be_judged():
    assert indices(group_of(0.0, None, 1.0), select="labels") == ([(0,), (2,)], {"failed": 1})


def test_what_cannot_be_a_row_is_left_out_with_its_reason():
    group = [
        Completed(0, "a", None, "failed", 3, error="broken"),
        Completed(1, "b", 9.0, "truncated", 3),
        Completed(2, " \n", 9.0, "completed", 3),
        Completed(3, "c", 1.0, "completed", 3),
        Completed(4, "c", 1.0, "completed", 3),
        Completed(5, "d", 0.0, "completed", 3),
    ]
    reasons = {"failed": 1, "truncated": 1, "empty": 1, "duplicate": 1}
    assert indices(group, select="all") == ([(3,), (5,)], reasons)
    assert indices(group, keep_truncated=True)[0] == [(1,)]


SCORES = st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.floats(-5, 5))
MEMBERS = st.tuples(SCORES, st.sampled_from(["", "a", "b", "c", "dd"]), st.sampled_from(["completed", "truncated"]))
SETTINGS = st.one_of(
    st.builds(
        SampleConfig,
        select=st.sampled_from(["best", "pairs"]),
        keep=st.integers(1, 4),
        min_score=st.one_of(st.none(), st.floats(-1, 1)),
        min_gap=st.floats(0, 2),
        keep_truncated=st.booleans(),
    ),
    st.builds(SampleConfig, select=st.sampled_from(["labels", "all"]), keep_truncated=st.booleans()),
)


@given(st.lists(MEMBERS, min_size=1, max_size=9), SETTINGS)
def test_every_completion_is_taken_once_or_dropped_for_a_reason(members, config):
    group = [Completed(i, text, score, status, 1) for i, (score, text, status) in enumerate(members)]
    chosen = select(group, config)
    taken = [one.index for row in chosen.taken for one in row]
    assert len(set(taken)) == len(taken)
    assert len(taken) + chosen.dropped.total() == len(group)
    assert all(count > 0 for count in chosen.dropped.values())


@given(st.lists(MEMBERS, min_size=1, max_size=9), SETTINGS)
def test_nothing_left_over_is_better_than_what_is_taken(members, config):
    group = [Completed(i, text, score, status, 1) for i, (score, text, status) in enumerate(members)]
    chosen = select(group, config)
    assert select(group[::-1], config) == chosen  # the order of arrival does not matter
    if config.select == "best" and chosen.taken:
        scores = [row[0].score for row in chosen.taken]
        assert scores == sorted(scores, reverse=True)
        usable = [one for one in group if one.score is not None and one.response.strip()]
        usable = [one for one in usable if config.keep_truncated or one.status == "completed"]
        first = {one.response: one.score for one in reversed(usable)}  # a text counts once, at its first index
        assert scores[0] == max(first.values())
    for row in chosen.taken if config.select == "pairs" else ():
        assert row[0].score - row[1].score >= max(config.min_gap, 1e-300)
        assert row[0].response != row[1].response
