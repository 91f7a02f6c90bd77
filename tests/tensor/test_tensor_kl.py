"""Estimates of the divergence, by hand."""

from __future__ import annotations

import pytest
import torch

from whet.tensor.kl import kl_estimate


@pytest.mark.parametrize(
    ("kind", "half", "minus_one"),
    # x = 0.5: k2 = 0.25 / 2, k3 = e^-0.5 - 1 + 0.5 = 0.60653 - 0.5; x = -1: k2 = 1 / 2, k3 = e - 1 - 1
    [("k1", 0.5, -1.0), ("k2", 0.125, 0.5), ("k3", 0.1065, 0.7183), ("low_var_kl", 0.1065, 0.7183)],
)
def test_the_four_estimates(kind, half: float, minus_one: float):
    logprobs, reference = torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -2.0])
    assert kl_estimate(logprobs, reference, kind).tolist() == pytest.approx([half, minus_one], abs=5e-5)


def test_low_var_kl_is_bounded_and_k3_is_not():
    logprobs, reference = torch.tensor([-20.0]), torch.tensor([-1.0])
    assert kl_estimate(logprobs, reference, "low_var_kl").item() == 10
    assert kl_estimate(logprobs, reference, "k3").item() == pytest.approx(178482300.96 - 20, rel=1e-6)  # e^19 - 1 - 19


@pytest.mark.parametrize("kind", ["k2", "k3", "low_var_kl"])
def test_a_policy_equal_to_its_reference_pays_nothing_and_is_not_pushed(kind):
    logprobs = torch.tensor([-0.5, -2.0], requires_grad=True)
    values = kl_estimate(logprobs, logprobs.detach(), kind)
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert values.tolist() == [0, 0] and gradient.tolist() == [0, 0]


def test_k3_is_unbiased_and_never_negative():
    # Two distributions over three tokens; the mean of k3 under the policy is the divergence itself.
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    k3 = kl_estimate(policy.log(), reference.log(), "k3")
    assert (policy * k3).sum().item() == pytest.approx((policy * (policy / reference).log()).sum().item(), rel=1e-5)
    assert (k3 >= 0).all()
