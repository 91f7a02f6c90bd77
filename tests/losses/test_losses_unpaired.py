"""KTO and its kin by hand: a desirable and an undesirable completion, their weights, their metrics."""

from __future__ import annotations

import math

import pytest
import torch

from whet.losses.unpaired import apo_zero_unpaired, bco, kto

# Desirable: Δ = 2. Undesirable: Δ = -1. Undesirable: Δ = 1.
ROWS = ([-1.0, -1.0], [-2.0], [-0.5, -0.5])
REFS = ([-2.0, -2.0], [-1.0], [-1.0, -1.0])
LABELS = [1.0, 0, 0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def example(rows_of):
    return rows_of(*ROWS, refs=REFS, per_unit=1, labels=LABELS, kl_baseline=[0.5] * 3, reward_mean=[0.25] * 3)


def test_kto_by_hand(example):
    values, metrics = kto(*example, beta=0.5)
    # 1 - σ(.5 (2 - .5)); 1 - σ(.5 (.5 + 1)); 1 - σ(.5 (.5 - 1))
    assert values.tolist() == pytest.approx([1 - sigmoid(0.75), 1 - sigmoid(0.75), 1 - sigmoid(-0.25)])
    assert metrics["kl"].tolist() == [0.5] * 3


def test_apo_zero_unpaired_by_hand(example):
    values, metrics = apo_zero_unpaired(*example, beta=0.5)
    assert values.tolist() == pytest.approx([1 - sigmoid(1), sigmoid(-0.5), sigmoid(0.5)])
    assert "kl" not in metrics


def test_bco_by_hand(example):
    values, _ = bco(*example, beta=0.5)
    # κ = .25: -log σ(1 - .25), -log σ(-(-.5 - .25)), -log σ(-(.5 - .25))
    assert values.tolist() == pytest.approx([-math.log(sigmoid(x)) for x in (0.75, 0.75, -0.25)])


@pytest.mark.parametrize("function", [kto, apo_zero_unpaired, bco])
def test_weights_go_by_label(function, example):
    plain, weighed = function(*example)[0], function(*example, desirable_weight=1.5, undesirable_weight=0.5)[0]
    assert torch.allclose(weighed, plain * torch.tensor([1.5, 0.5, 0.5]))
    assert torch.equal(function(*example, undesirable_weight=0.0)[0][1:], torch.zeros(2))


@pytest.mark.parametrize("function", [kto, apo_zero_unpaired, bco])
def test_metrics_of_a_side_say_nothing_on_rows_of_the_other(function, example):
    metrics = function(*example, beta=0.5, desirable_weight=3.0)[1]
    nan = math.nan
    for name, right in {
        "rewards/chosen": [1, nan, nan],
        "rewards/rejected": [nan, -0.5, 0.5],
        "logps/chosen": [-2, nan, nan],
        "logps/rejected": [nan, -2, -1],
    }.items():
        assert metrics[name].tolist() == pytest.approx(right, nan_ok=True), name
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("function", [kto, apo_zero_unpaired, bco])
def test_desirable_becomes_likelier_and_undesirable_less_likely(function, example):
    (gradient,) = torch.autograd.grad(function(*example)[0].sum(), example[0]["logprobs"])
    assert gradient.sign().tolist() == [0, -1, -1, 0, 1, 0, 1, 1]
