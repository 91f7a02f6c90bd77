"""The critic's loss by hand and against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from whet.losses.value import value


def test_value_by_hand(batch_of):
    # v 1, R 2, v_old 1: ½ (1 - 2)². v 1, R 2, v_old 0: clipped to .2, ½ (.2 - 2)² = 1.62 > ½.
    # v 1, R 0, v_old 0: clipped to .2, ½ .04 < ½ 1.
    batch = batch_of(3, values=[0, 1.0, 0, 0], returns=[0, 2.0, 2, 0])
    values, metrics = value({"values": torch.tensor([0, 1.0, 1, 1])}, batch)
    assert values.tolist() == pytest.approx([0, 0.5, 1.62, 0.5])
    assert metrics["value_clip_fraction"].tolist() == [0, 0, 1, 1]


def test_a_value_clipped_away_from_its_return_is_not_pushed_further(batch_of):
    v = torch.tensor([0, 1.0, 1.0], requires_grad=True)
    values, _ = value({"values": v}, batch_of(2, values=[0, 0.0, 0], returns=[0, 2.0, 0]))
    (gradient,) = torch.autograd.grad(values.sum(), v)
    assert gradient.tolist() == [0, 0, 1]


def test_values_and_gradients_follow_the_formula(batch_of):
    draw = torch.Generator().manual_seed(0)
    v, old, returns = (torch.randn(31, generator=draw, dtype=torch.float64) for _ in range(3))
    ours, exact = v.float().requires_grad_(), v.clone().requires_grad_()
    batch = batch_of(30, values=old.float().tolist(), returns=returns.float().tolist())
    value({"values": ours}, batch, clip=0.5)[0].sum().backward()
    clipped = old + (exact - old).clamp(-0.5, 0.5)
    torch.maximum((exact - returns) ** 2, (clipped - returns) ** 2).mul(0.5).sum().backward()
    assert torch.allclose(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
