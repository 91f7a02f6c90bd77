"""Credit from token to token by hand, against a plain loop, and where tokens are masked."""

from __future__ import annotations

import pytest
import torch

from whet.batch import Batch, collate
from whet.credit import CREDITS, whiten
from whet.types import Sample, Unit


def rows(*masks: str, rewards: list[float], **columns: list[float]) -> Batch:
    """One unit per mask, written with 1 for a trained token, behind one token of prompt."""
    samples = [
        Sample([1] * (len(mask) + 1), [False, *(c == "1" for c in mask)], None, reward)
        for mask, reward in zip(masks, rewards, strict=True)
    ]
    batch = collate([Unit(str(i), (sample,)) for i, sample in enumerate(samples)])
    return batch.with_columns(**{name: torch.tensor(values) for name, values in columns.items()})


def test_gae_by_hand():
    # δ: 0 + .2 - .1 = .1, 0 + .3 - .2 = .1, 1 - .3 = .7; .7; .1 + .95 * .7 = .765; .1 + .95 * .765 = .82675
    batch = CREDITS["gae"](rows("111", rewards=[1.0], values=[0, 0.1, 0.2, 0.3]))
    assert batch["advantages"].tolist() == pytest.approx([0, 0.82675, 0.765, 0.7])
    assert batch["returns"].tolist() == pytest.approx([0, 0.92675, 0.965, 1.0])


def test_masked_tokens_are_skipped_and_are_no_steps():
    plain = CREDITS["gae"](rows("111", rewards=[1.0], values=[0, 0.1, 0.2, 0.3]), gamma=0.9, lam=0.8)
    # A tool's output between the first token and the second, with whatever values stand there.
    batch = rows("10011", rewards=[1.0], values=[9.0, 0.1, 7, -7, 0.2, 0.3])
    masked = CREDITS["gae"](batch, gamma=0.9, lam=0.8)
    for name in ("advantages", "returns"):
        assert masked[name][batch.loss_mask].tolist() == plain[name][1:].tolist()
        assert masked[name][~batch.loss_mask].tolist() == [0, 0, 0]


def test_a_penalty_is_a_reward_of_its_token():
    # γ 1, λ 1: advantages are what is to come, less the value: -.1 - .2 + 1 - .5, -.2 + 1 - .5
    batch = rows("11", rewards=[1.0], values=[0, 0.5, 0.5], kl_penalties=[5.0, 0.1, 0.2])
    assert CREDITS["gae"](batch, lam=1.0)["advantages"].tolist() == pytest.approx([0, 0.2, 0.3])


def test_reinforce_plus_plus_by_hand():
    # γ .5, rewards -.1, -.2, 1 - .3: .7; -.2 + .35 = .15; -.1 + .075 = -.025
    batch = rows("1011", rewards=[1.0], kl_penalties=[0, 0.1, 8.0, 0.2, 0.3])
    found = CREDITS["reinforce_plus_plus"](batch, gamma=0.5)["advantages"]
    assert found.tolist() == pytest.approx([0, -0.025, 0, 0.15, 0.7])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_ragged_batches_are_those_of_a_loop_over_each_row(gamma: float, lam: float):
    draw = torch.Generator().manual_seed(0)
    masks = ["1", "1101", "0", "0011", "111111", "1000"]
    size = sum(map(len, masks)) + len(masks)
    values, penalties = (torch.randn(size, generator=draw).tolist() for _ in range(2))
    rewards = torch.randn(len(masks), generator=draw).tolist()
    batch = rows(*masks, rewards=rewards, values=values, kl_penalties=penalties)
    found = CREDITS["gae"](batch, gamma=gamma, lam=lam)
    start = 0
    for mask, reward in zip(masks, rewards, strict=True):
        places = [start + 1 + i for i, c in enumerate(mask) if c == "1"]
        advantage, following, right = 0.0, 0.0, {}
        for place in reversed(places):
            step = -penalties[place] + (reward if place == places[-1] else 0)
            advantage = step + gamma * following - values[place] + gamma * lam * advantage
            following, right[place] = values[place], advantage
        for place in range(start, start + len(mask) + 1):
            assert found["advantages"][place].item() == pytest.approx(right.get(place, 0.0), abs=1e-5)
            if place in right:
                assert found["returns"][place].item() == pytest.approx(right[place] + values[place], abs=1e-5)
        start += len(mask) + 1


def test_a_batch_without_trained_tokens_has_no_advantages():
    batch = CREDITS["gae"](rows("0", "00", rewards=[1.0, 2.0], values=[1.0] * 5))
    assert batch["advantages"].tolist() == [0] * 5 and batch["returns"].tolist() == [0] * 5


def test_whitening_goes_over_the_trained_tokens_of_all_rows():
    # 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3 = 14/3
    batch = rows("11", "101", rewards=[0.0, 0.0], advantages=[9.0, 1, 2, 9, 3, 9, 6])
    scale = (14 / 3) ** 0.5
    found = whiten(batch)["advantages"].tolist()
    assert found == pytest.approx([0, -2 / scale, -1 / scale, 0, 0, 0, 3 / scale])


@pytest.mark.parametrize("advantage", [0.0, 0.1, 1e8, -1 / 3])
@pytest.mark.parametrize("masks", [("1",), ("11", "1"), ("0", "111"), ("0",)], ids=str)
def test_a_constant_batch_is_whitened_to_nothing(advantage: float, masks: tuple[str, ...]):
    size = sum(map(len, masks)) + len(masks)
    batch = rows(*masks, rewards=[0.0] * len(masks), advantages=[advantage] * size)
    assert whiten(batch)["advantages"].tolist() == [0.0] * size


def test_opd_is_minus_the_gap_to_the_teacher_and_adds_to_what_is_there():
    columns = {"old_logprobs": [0, -1.0, -2.0], "teacher_logprobs": [0, -1.5, -1.0]}
    batch = rows("11", rewards=[0.0], **columns)
    assert CREDITS["opd"](batch, coef=2.0)["advantages"].tolist() == [0, -1, 2]
    added = CREDITS["opd"](batch.with_columns(advantages=torch.tensor([0, 3.0, 3.0])))
    assert added["advantages"].tolist() == [0, 2.5, 4]
