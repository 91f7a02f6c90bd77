"""Units as arrays: what truncation leaves of a pair, what is dropped and counted, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from whet.data.builder import Builder
from whet.data.encode import Encoded
from whet.data.problems import Malformed
from whet.data.units import Draft
from whet.errors import DataError

END = 9


def side(prompt: int, answer: int, fill: int = 1) -> Encoded:
    """A sequence of `prompt` zeros, then `answer - 1` times `fill` and END, trained."""
    tokens = [0] * prompt + [fill] * (answer - 1) + [END]
    return Encoded(np.array(tokens, dtype=np.int32), np.arange(len(tokens)) >= prompt, prompt)


def pair(prompt: int, chosen: int, rejected: int, margin: float | None = None) -> Draft:
    return Draft((side(prompt, chosen), side(prompt, rejected, fill=2)), prompt, (1.0, 0.0), margin)


def test_pairs_grow_into_arrays():
    builder = Builder("preference", 100, "error")
    builder.add(0, 1, pair(2, 3, 2, margin=0.5))
    builder.add(0, 4, pair(1, 2, 3, margin=-1.0))
    found = builder.arrays()
    assert found["tokens"].tolist() == [0, 0, 1, 1, END, 0, 0, 2, END, 0, 1, END, 0, 2, 2, END]
    assert (
        found["mask"].tolist()
        == [False] * 2 + [True] * 3 + [False] * 2 + [True] * 2 + [False, True, True] + [False] + [True] * 3
    )
    assert found["sample_ends"].tolist() == [5, 9, 12, 16]
    assert found["unit_ends"].tolist() == [2, 4]
    assert found["labels"].tolist() == [1, 0, 1, 0] and found["labels"].dtype == np.float32
    assert found["margins"].tolist() == [0.5, -1.0] and found["margins"].dtype == np.float32
    assert (found["prompts"].tolist(), found["places"].tolist(), found["rows"].tolist()) == ([2, 1], [1, 4], [0, 1])
    assert found["full_lengths"].tolist() == [5, 4]


def test_rows_to_imitate_have_neither_labels_nor_margins():
    builder = Builder("sft", 100, "error")
    builder.add(0, 0, Draft((side(1, 2),), 1))
    assert {"labels", "margins"}.isdisjoint(builder.arrays())


def cut(task: str, draft: Draft, max_length: int = 6, policy: str = "truncate") -> Builder:
    """A builder with that unit, and a short one before it."""
    builder = Builder(task, max_length, policy)  # pyright: ignore[reportArgumentType]
    builder.add(0, 0, pair(1, 2, 2))
    builder.add(0, 1, draft)
    return builder


def kept(builder: Builder) -> list[list[int]]:
    """The tokens of the second unit."""
    found = builder.arrays()
    return [part.tolist() for part in np.split(found["tokens"], found["sample_ends"])[2:-1]]


def test_truncation_cuts_the_long_side_and_leaves_the_other():
    builder = cut("preference", pair(3, 5, 2))
    assert kept(builder) == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 2, END]]
    assert builder.arrays()["cut"].tolist() == [False, True]
    assert builder.counts == {}


def test_the_token_that_ends_an_answer_stays_where_a_score_is_read_off_it():
    builder = cut("reward", pair(3, 5, 2))
    assert kept(builder) == [[0, 0, 0, 1, 1, END], [0, 0, 0, 2, END]]
    assert builder.arrays()["mask"].tolist()[6:] == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 2


@pytest.mark.parametrize("task", ["preference", "reward"])
def test_a_pair_that_loses_one_side_is_dropped_as_a_whole(task: str):
    # Of a prompt of 6 tokens nothing of an answer is left, of 5 one token, which in a reward is no answer.
    builder = cut(task, Draft((side(6, 2), side(2, 2, fill=2)), 2, (1.0, 0.0)))
    assert (builder.counts["dropped"], builder.counts["untrained"]) == (1, 1)
    assert builder.arrays()["unit_ends"].tolist() == [2]
    assert builder.arrays()["full_lengths"].tolist() == [4 - 1, 8]
    beside = cut(task, Draft((side(5, 3), side(2, 2, fill=2)), 2, (1.0, 0.0)))
    assert beside.counts["dropped"] == (task == "reward")


def test_pairs_that_are_too_long_are_dropped_or_refused_on_request():
    builder = cut("preference", pair(3, 5, 2), policy="drop")
    assert (builder.counts["dropped"], builder.counts["untrained"]) == (1, 0)
    with pytest.raises(Malformed, match=r"the row has 8 tokens, but data\.max_length is 6; raise it"):
        cut("preference", pair(3, 5, 2), policy="error")


def test_a_pair_that_is_the_same_after_truncation_is_left_out():
    builder = cut("preference", Draft((side(3, 5), side(3, 6)), 3, (1.0, 0.0)))
    assert (builder.counts["identical"], builder.counts["dropped"], builder.first_identical) == (1, 0, (0, 1))
    assert builder.notes() == {"dropped": 0, "untrained": 0, "identical": 1, "first_identical": (0, 1)}
    # The number of a row does not depend on those before it that are left out.
    builder.add(0, 2, pair(1, 2, 2))
    assert builder.arrays()["rows"].tolist() == [0, 2]


def test_a_pair_that_trains_nothing_on_one_side_is_refused():
    untrained = Encoded(np.array([0, 1], dtype=np.int32), np.array([False, False]), 1)
    with pytest.raises(Malformed, match=r"no token of the row is trained"):
        cut("preference", Draft((side(1, 2), untrained), 1, (1.0, 0.0)))


def test_nothing_left_says_why():
    same = Builder("preference", 100, "truncate")
    same.add(0, 0, Draft((side(1, 2), side(1, 2)), 1, (1.0, 0.0)))
    with pytest.raises(DataError, match=r"none of 1 pairs is left: in each, chosen and rejected are the same tokens"):
        same.arrays()
    same.max_length = 2
    same.add(0, 1, pair(3, 2, 2))
    with pytest.raises(DataError) as caught:
        same.arrays()
    assert str(caught.value) == (
        "none of 2 rows is left: all are longer than data.max_length (2 tokens), and dropped or left with nothing to "
        "train, or the same completion twice (1); the shortest has 3; raise it"
    )
