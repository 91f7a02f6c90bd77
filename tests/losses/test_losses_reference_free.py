"""SimPO, CPO and ORPO by hand, both ways of giving SimPO's margin, and log(1 - e^x) against float64."""

from __future__ import annotations

import math

import pytest
import torch

from whet.losses import create_loss
from whet.losses.reference_free import cpo, log1mexp, orpo, simpo

# Chosen: 2 tokens, L = -1, l = -.5. Rejected: 4 tokens, L = -6, l = -1.5.
ROWS = ([-0.25, -0.75], [-1.5] * 4)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_cpo_by_hand(rows_of):
    out, batch = rows_of(*ROWS)
    values, metrics = cpo(out, batch, beta=0.1)  # .1 (-1 + 6) = .5
    assert values.item() == pytest.approx(softplus(-0.5))
    assert metrics["rewards/chosen"].item() == pytest.approx(-0.1)
    assert metrics["logps/rejected"].item() == pytest.approx(-6)
    values, _ = cpo(out, batch, beta=0.1, label_smoothing=0.25)
    assert values.item() == pytest.approx(0.75 * softplus(-0.5) + 0.25 * softplus(0.5))


def test_simpo_by_hand(rows_of):
    out, batch = rows_of(*ROWS)
    values, metrics = simpo(out, batch)  # 2 (-.5 + 1.5) - 1 = 1
    assert values.item() == pytest.approx(softplus(-1))
    assert metrics["rewards/margins"].item() == pytest.approx(2)
    assert metrics["logps/chosen"].item() == pytest.approx(-0.5)
    values, _ = simpo(out, batch, beta=2.5, gamma=0.5, label_smoothing=0.1)  # 2.5 - .5 = 2
    assert values.item() == pytest.approx(0.9 * softplus(-2) + 0.1 * softplus(2))


def test_the_margin_of_simpo_can_be_given_as_a_ratio(rows_of):
    out, batch = rows_of(*ROWS)
    assert torch.equal(simpo(out, batch, beta=2.5, gamma_ratio=0.2)[0], simpo(out, batch, beta=2.5, gamma=0.5)[0])
    assert torch.equal(simpo(out, batch)[0], simpo(out, batch, gamma_ratio=0.5)[0])
    assert simpo(out, batch, gamma=0.0)[0].item() == pytest.approx(softplus(-2)), "0 is a margin, not the default"
    assert simpo(out, batch, gamma_ratio=0.0)[0].item() == pytest.approx(softplus(-2))
    with pytest.raises(ValueError, match="give one of them"):
        create_loss("simpo", gamma=1.0, gamma_ratio=0.5)(out, batch)


def test_orpo_by_hand(rows_of):
    # odds of p = e^-.5 and e^-1.5: log(p / (1 - p)) = .432752 and -1.247518; log(1 + e^-1.680270) = .170859
    out, batch = rows_of(*ROWS)
    values, metrics = orpo(out, batch, beta=0.5)
    assert values.item() == pytest.approx(0.5 * 0.170859, abs=1e-6)
    assert metrics["log_odds_chosen"].item() == pytest.approx(1.680270, abs=1e-5)
    assert metrics["log_odds_ratio"].item() == pytest.approx(-0.170859, abs=1e-5)
    assert metrics["logps/chosen"].item() == pytest.approx(-0.5)
    assert metrics["rewards/rejected"].item() == pytest.approx(-0.75)


def test_log1mexp_is_exact_from_tiny_to_huge():
    x = -torch.logspace(-6, 2, 400, dtype=torch.float64)
    x = torch.cat([x.float(), torch.tensor([-math.log(2)])]).requires_grad_()
    exact = x.detach().double().requires_grad_()
    values, right = log1mexp(x), torch.where(exact < -0.7, torch.log1p(-exact.exp()), (-exact.expm1()).log())
    assert torch.allclose(values.double(), right, rtol=2e-6, atol=1e-38)
    values.sum().backward()
    right.sum().backward()
    assert torch.allclose(x.grad.double(), exact.grad, rtol=2e-6, atol=1e-38)


def test_certainty_and_impossibility_keep_orpo_finite(rows_of):
    for rows in (([0.0], [-1e4]), ([-1e4], [0.0]), ([0.0], [0.0]), ([-1e-9], [-1e-9])):
        out, batch = rows_of(*rows)
        values, metrics = orpo(out, batch)
        (gradient,) = torch.autograd.grad(values.sum(), out["logprobs"])
        assert torch.isfinite(values).all() and torch.isfinite(gradient).all()
        assert all(torch.isfinite(metric).all() for metric in metrics.values())
