"""Shaping of rewards by hand, and the penalties that are taken from them."""

from __future__ import annotations

import math

import pytest
import torch

from whet.annotate import KLPenalty
from whet.batch import Batch, collate
from whet.credit import CREDITS
from whet.errors import DataError
from whet.shaping import Shaping, overlong
from whet.types import Sample, Unit


def group(*lengths: int, rewards: list[float], truncated: list[float] | None = None) -> Batch:
    """One unit of sequences with these numbers of trained tokens, each behind one token of prompt."""
    cut = truncated or [0.0] * len(lengths)
    samples = [
        Sample([1] * (n + 1), [False] + [True] * n, None, r, {"truncated": c})
        for n, r, c in zip(lengths, rewards, cut, strict=True)
    ]
    return collate([Unit("g", tuple(samples))])


def test_long_completions_are_punished_over_the_last_tokens():
    # longest 20, buffer 5: nothing up to 15, then a fifth for each token
    lengths = torch.tensor([1, 15, 16, 18, 20, 25])
    assert overlong(lengths, 20, 5).tolist() == pytest.approx([0, 0, 0.2, 0.6, 1, 1])


def test_the_punishment_comes_after_the_clip_and_counts_what_was_sampled():
    batch = group(2, 3, 4, rewards=[5.0, 5.0, -5.0])
    shaped = Shaping(4, scale=0.5, clip=2.0, buffer=2, overlong_coef=3.0)(batch, {}, {})
    assert shaped["rewards"].tolist() == pytest.approx([2, 2 - 1.5, -2 - 3])


def test_completions_that_were_cut_off_are_not_trained_and_still_count_in_their_group():
    batch = group(1, 2, rewards=[1.0, 0.0], truncated=[0.0, 1.0])
    shaped = Shaping(2, mask_truncated=True)(batch, {}, {})
    assert shaped.loss_mask.tolist() == [False, True, False, False, False]
    assert shaped.num_trained.tolist() == [1, 0]
    assert CREDITS["grpo_no_std"](shaped)["advantages"].tolist() == [0, 0.5, 0, 0, 0]


def test_a_transform_that_gives_no_numbers_is_told():
    with pytest.raises(DataError, match=r"shaping.transform: infinite gave a reward that is not finite: \[inf, 1.0\]"):

        def infinite(rewards: torch.Tensor, batch: Batch) -> torch.Tensor:
            return torch.tensor([math.inf, 1.0])

        Shaping(4, transform=infinite)(group(1, 1, rewards=[0.0, 0.0]), {}, {})


@pytest.mark.parametrize(("kind", "expected"), [("k1", 0.05), ("k2", 0.0125), ("k3", 0.01065)])
def test_penalties_are_those_of_the_old_policy_on_trained_tokens(kind: str, expected: float):
    batch = group(1, rewards=[0.0]).with_columns(
        old_logprobs=torch.tensor([9.0, -1.0]), ref_logprobs=torch.tensor([0.0, -1.5])
    )
    assert KLPenalty(0.1, kind)(batch, {}, {})["kl_penalties"].tolist() == pytest.approx([0, expected], abs=1e-5)
