"""Credit within groups: worked numbers, groups of any size, and nothing where there is nothing to tell apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whet.batch import Batch, collate
from whet.credit import CREDITS, Credit
from whet.errors import DataError
from whet.types import Sample, Unit

GROUPED = ("grpo", "grpo_no_std", "rloo", "maxrl")
"""Rules that give every token of a sequence what it is better by than its siblings."""


def batch_of(*groups: list[float], trained: int = 2) -> Batch:
    """One unit per list of rewards; each sequence has one token of prompt and `trained` trained ones."""
    mask = [False] + [True] * trained
    return collate(
        [
            Unit(str(i), tuple(Sample([1] * len(mask), mask, None, r) for r in rewards))
            for i, rewards in enumerate(groups)
        ]
    )


def advantages(name: str, *groups: list[float]) -> list[list[float]]:
    """The advantage of every sequence, by group; all trained tokens of a sequence must have the same."""
    batch = CREDITS[name](batch_of(*groups))
    tokens = batch["advantages"].view(-1, 3)
    assert (tokens[:, 0] == 0).all(), "the prompt gets none"
    assert (tokens[:, 1] == tokens[:, 2]).all()
    values = iter(tokens[:, 1].tolist())
    return [[next(values) for _ in group] for group in groups]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", [1.5, -0.5, -0.5, -0.5]),  # mean 1/4, unbiased std 1/2
        ("grpo_no_std", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1, -1 / 3, -1 / 3, -1 / 3]),  # 1 - 0; 0 - 1/3
        ("maxrl", [3, -1, -1, -1]),  # .75 / .25; -.25 / .25
    ],
)
def test_one_right_answer_of_four(name: str, expected: list[float]):
    assert advantages(name, [1, 0, 0, 0]) == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.parametrize("name", GROUPED)
def test_a_missing_member_changes_its_own_group_only(name: str):
    whole = advantages(name, [1, 0, 0, 0], [0, 1, 1, 0], [2, 0, 0, 2])
    short = advantages(name, [1, 0, 0, 0], [0, 1, 1], [2, 0, 0, 2])
    assert short[0] == whole[0] and short[2] == whole[2]
    assert short[1] == advantages(name, [0, 1, 1])[0]
    assert len({round(a, 6) for a in short[1]}) == 2 and sum(short[1]) == pytest.approx(0, abs=1e-6)


def test_a_group_of_three_by_hand():
    # [0, 1, 1]: mean 2/3, unbiased variance (4/9 + 1/9 + 1/9) / 2 = 1/3; -2/3 / .57735, 1/3 / .57735
    assert advantages("grpo", [0, 1, 1])[0] == pytest.approx([-1.154701, 0.577350, 0.577350], abs=1e-5)
    assert advantages("rloo", [0, 1, 1])[0] == pytest.approx([-1, 0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("rewards", [[0.0], [0.1]])
def test_a_group_of_one_gets_exactly_nothing(name: str, rewards: list[float]):
    assert advantages(name, rewards, [1, 0])[0] == [0.0]


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7, 1e8 + 8, -0.9])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_rewards_give_exactly_nothing(name: str, reward: float, size: int):
    reward = abs(reward) if name == "maxrl" else reward
    # Their mean in float32 may be another number than they are, and dividing by the std would blow it up.
    assert advantages(name, [reward] * size, [1, 0])[0] == [0.0] * size


@pytest.mark.parametrize("name", GROUPED)
def test_a_row_without_trained_tokens_counts_in_its_group_and_gets_nothing(name: str):
    rows = [Sample([1, 2], [False, True], None, 1.0), Sample([1, 3], [False, False], None, 0.0)]
    batch = CREDITS[name](collate([Unit("a", tuple(rows))]))
    assert batch["advantages"][1] > 0
    assert batch["advantages"][[0, 2, 3]].tolist() == [0, 0, 0]


rewards = st.lists(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6), min_size=1, max_size=5)


@pytest.mark.parametrize("name", GROUPED)
@given(groups=rewards)
def test_against_the_formula_in_float64(name: str, groups: list[list[float]]):
    if name == "maxrl":  # nothing below 0, and no mean so near to it that float32 rounds it away
        groups = [[abs(reward) + 0.01 * (reward != 0) for reward in group] for group in groups]
    for found, group in zip(advantages(name, *groups), groups, strict=True):
        r = torch.tensor(group, dtype=torch.float64)
        if len(set(group)) == 1:
            assert found == [0.0] * len(group)
            continue
        right = r - r.mean()
        if name == "grpo":
            right = right / (r.std() + 1e-6)
        if name == "maxrl":
            right = right / r.mean()
        if name == "rloo":
            right = r - (r.sum() - r) / (len(r) - 1)
        assert found == pytest.approx(right.tolist(), rel=1e-3, abs=1e-4 if name == "grpo" else 1e-5)


DECLARED = {
    **dict.fromkeys(GROUPED, ({"rewards"}, {"advantages"}, 2, False)),
    "reinforce_plus_plus": ({"rewards"}, {"advantages"}, 1, True),
    "reinforce_plus_plus_baseline": ({"rewards"}, {"advantages"}, 2, True),
    "remax": ({"rewards", "baseline_rewards"}, {"advantages"}, 1, False),
    "gae": ({"rewards", "values"}, {"advantages", "returns"}, 1, True),
    "opd": ({"old_logprobs", "teacher_logprobs"}, {"advantages"}, 1, False),
}


@pytest.mark.parametrize("name", CREDITS)
def test_every_rule_declares_what_it_needs(name: str):
    rule = CREDITS[name]
    assert isinstance(rule, Credit)
    assert (rule.reads, rule.writes, rule.min_group, rule.whitened) == DECLARED[name]


def test_a_negative_reward_has_no_likelihood():
    with pytest.raises(DataError, match=r"divides by the mean reward .* a reward of -1; use rewards from 0 on"):
        advantages("maxrl", [1, -1])


def test_a_group_in_which_nothing_is_right_teaches_nothing():
    assert advantages("maxrl", [0, 0, 0]) == [[0, 0, 0]]


def with_penalties(batch: Batch, *penalties: float) -> Batch:
    """The same with these KL penalties on the trained tokens, in turn."""
    column = torch.zeros(batch.num_tokens)
    column[batch.loss_mask] = torch.tensor(penalties)
    return batch.with_columns(kl_penalties=column)


def test_a_penalty_in_the_reward_is_taken_from_the_sequence():
    # two tokens each: rewards 1 - .3 and 1 - .1, mean .8
    batch = CREDITS["grpo_no_std"](with_penalties(batch_of([1, 1]), 0.1, 0.2, 0.1, 0.0))
    assert batch["advantages"].tolist() == pytest.approx([0, -0.1, -0.1, 0, 0.1, 0.1])


def test_reinforce_plus_plus_baseline_takes_the_penalty_of_each_token():
    # rewards 1 and 0, mean .5, less what the tokens are fined
    batch = CREDITS["reinforce_plus_plus_baseline"](with_penalties(batch_of([1, 0]), 0.1, 0.2, 0.0, -0.1))
    assert batch["advantages"].tolist() == pytest.approx([0, 0.4, 0.3, 0, -0.5, -0.4])


def test_remax_compares_with_the_greedy_completion_of_the_prompt():
    batch = batch_of([1, 0], [0.5]).with_columns(baseline_rewards=torch.tensor([0.25, 0.5]))
    assert CREDITS["remax"](batch)["advantages"].view(-1, 3)[:, 1:].tolist() == [[0.75] * 2, [-0.25] * 2, [0, 0]]
