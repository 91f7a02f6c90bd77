"""The Bradley-Terry loss by hand and against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch

from whet.losses.reward import bradley_terry


def test_bradley_terry_by_hand(batch_of):
    # pairs (2, 0), (1, 1), (0, 3): log(1 + e^-2) = .126928, log 2, log(1 + e^3) = 3.048587
    values, metrics = bradley_terry({"scores": torch.tensor([2.0, 0, 1, 1, 0, 3])}, batch_of(*[1] * 6, per_unit=2))
    assert values.tolist() == pytest.approx([0.126928, math.log(2), 3.048587], abs=1e-5)
    assert {name: metric.tolist() for name, metric in metrics.items()} == {
        "accuracy": [1, 0, 0],  # a draw is not a win
        "margin": [2, 0, -3],
        "min_reward": [0, 1, 0],
        "mean_reward": [1, 1, 1.5],
        "max_reward": [2, 1, 3],
    }


def test_centering_pulls_the_scores_of_a_pair_towards_zero(batch_of):
    batch = batch_of(1, 1, per_unit=2)
    plain, centered = (bradley_terry({"scores": torch.tensor([3.0, 1])}, batch, centering=c)[0] for c in (0.0, 0.01))
    assert (centered - plain).item() == pytest.approx(0.01 * 16)


def test_a_margin_asks_for_a_larger_difference(batch_of):
    # (2, 0) ahead by 2 of 3: log(1 + e^1); (1, 1) with margin 0 as before; (0, 2) with -1: log(1 + e^1)
    scores = torch.tensor([2.0, 0, 1, 1, 0, 2])
    values, metrics = bradley_terry({"scores": scores}, batch_of(*[1] * 6, per_unit=2, margins=[3.0, 0, -1]))
    assert values.tolist() == pytest.approx([math.log1p(math.e), math.log(2), math.log1p(math.e)])
    assert metrics["margin"].tolist() == [2, 0, -2], "what is reported is how far the scores are apart"
    assert metrics["accuracy"].tolist() == [1, 0, 0]


def test_values_and_gradients_follow_the_formula(batch_of):
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(20, generator=draw, dtype=torch.float64) * 5
    margins = torch.rand(10, generator=draw, dtype=torch.float64).float()
    ours, exact = scores.float().requires_grad_(), scores.clone().requires_grad_()
    batch = batch_of(*[1] * 20, per_unit=2, margins=margins.tolist())
    bradley_terry({"scores": ours}, batch, centering=0.1)[0].sum().backward()
    chosen, rejected = exact.view(-1, 2).unbind(1)
    (-(1 / (1 + (rejected - chosen + margins).exp())).log() + 0.1 * (chosen + rejected) ** 2).sum().backward()
    assert torch.allclose(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_very_different_scores_stay_finite(batch_of):
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    values, metrics = bradley_terry({"scores": scores}, batch_of(1, 1, per_unit=2))
    values.sum().backward()
    assert values.item() == pytest.approx(2e4) and scores.grad.tolist() == [-1, 1]
    assert not any(metric.requires_grad for metric in metrics.values())


def test_bf16_scores_are_compared_in_float32(batch_of):
    scores = torch.tensor([3.015625, 0.0123], dtype=torch.bfloat16)
    values, _ = bradley_terry({"scores": scores}, batch_of(1, 1, per_unit=2, margins=[0.001]))
    right, _ = bradley_terry({"scores": scores.float()}, batch_of(1, 1, per_unit=2, margins=[0.001]))
    assert values.dtype == torch.float32 and torch.equal(values, right)
