"""Policy losses: worked vectors, and gradients against formulas of their own in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from whet.losses import LOSSES
from whet.losses.policy import cispo, entropy_bonus, gspo, kl, ppo_clip, reinforce, sapo

LOG2 = math.log(2)


def outputs(logprobs: list[float] | Tensor) -> dict[str, Tensor]:
    logprobs = torch.as_tensor(logprobs)
    return {"logprobs": logprobs, "entropy": torch.ones_like(logprobs)}


def test_ppo_clip_by_hand(batch_of):
    # ratios 2 2 .5 .5, clipped to 1.28 1.28 .8 .8
    # max(-2, -1.28), max(2, 1.28), max(-.5, -.8), max(.5, .8)
    batch = batch_of(4, advantages=[0, 1.0, -1, 1, -1], old_logprobs=[0.0, -3, -3, -3, -3])
    values, metrics = ppo_clip(outputs([0, -3 + LOG2, -3 + LOG2, -3 - LOG2, -3 - LOG2]), batch)
    assert values[1:].tolist() == pytest.approx([-1.28, 2, -0.5, 0.8])
    clipped = metrics["clip_fraction_low"].float() + metrics["clip_fraction_high"].float()
    assert clipped[1:].tolist() == [1, 0, 0, 1]
    assert metrics["clip_fraction_high"][1:].tolist() == [True, False, False, False]
    assert metrics["importance_weight"][1:].tolist() == pytest.approx([2, 2, 0.5, 0.5])
    assert metrics["ppo_kl"][1:].tolist() == pytest.approx([-LOG2, -LOG2, LOG2, LOG2])


def test_dual_clip_bounds_what_a_bad_sample_can_cost(batch_of):
    # ratio 5, A -1: max(5, 1.28) = 5, bounded by c = 3; ratio 5, A 1 is not touched; ratio 2, A -1 neither
    batch = batch_of(3, advantages=[0, -1.0, 1, -1], old_logprobs=[0.0] * 4)
    out = outputs([0, math.log(5), math.log(5), LOG2])
    assert ppo_clip(out, batch, dual_clip=3.0)[0][1:].tolist() == pytest.approx([3, -1.28, 2])
    assert ppo_clip(out, batch)[0][1].item() == pytest.approx(5)


def test_other_limits_of_the_clip(batch_of):
    batch = batch_of(2, advantages=[0, 1.0, -1], old_logprobs=[0.0] * 3)
    values, _ = ppo_clip(outputs([0, LOG2, -LOG2]), batch, clip_low=0.1, clip_high=0.5)
    assert values[1:].tolist() == pytest.approx([-1.5, 0.9])


def test_without_old_logprobs_the_batch_is_on_policy(batch_of):
    batch = batch_of(2, advantages=[0, 2.0, -3])
    logprobs = torch.tensor([0, -1.0, -2], requires_grad=True)
    values, metrics = ppo_clip(outputs(logprobs), batch)
    assert values.tolist() == [0, -2, 3]  # ratio 1: minus the advantage
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert gradient.tolist() == [0, -2, 3]
    assert metrics["importance_weight"].tolist() == [1, 1, 1]


def test_gspo_by_hand(batch_of):
    # log ratios 2 log 2, 0: mean log 2, ratio 2 on both; A 1: -min(2, 1.1); A -1: 2. Next row: -2 log 2, ratio 1/4
    advantages = [0, 1.0, -1, 0, -1]
    batch = batch_of(2, 1, advantages=advantages, old_logprobs=[0.0, -3, -3, 0, -1])
    values, metrics = gspo(outputs([9, -3 + 2 * LOG2, -3, 9, -1 - 2 * LOG2]), batch, clip_low=0.2, clip_high=0.1)
    assert values[[1, 2, 4]].tolist() == pytest.approx([-1.1, 2, 0.8])
    assert metrics["importance_weight"][[1, 2, 4]].tolist() == pytest.approx([2, 2, 0.25])
    assert metrics["clip_fraction_high"].tolist() == [False, True, False, False, False]
    assert metrics["clip_fraction_low"].tolist() == [False, False, False, False, True]


def test_the_gradient_of_gspo_goes_through_the_mean(batch_of):
    # one value -ρ A per token, ρ = exp((x + y) / 2) = 1: each of the two values gives -A / 2 to each token
    logprobs = torch.tensor([0, -1.0, -2.0], requires_grad=True)
    batch = batch_of(2, advantages=[0, 3.0, 3.0], old_logprobs=[0, -1.0, -2.0])
    (gradient,) = torch.autograd.grad(gspo(outputs(logprobs), batch)[0].sum(), logprobs)
    assert gradient.tolist() == pytest.approx([0, -3, -3])
    (one,) = torch.autograd.grad(gspo(outputs(logprobs), batch)[0][1], logprobs)
    assert one.tolist() == pytest.approx([0, -1.5, -1.5])


def test_cispo_by_hand_still_learns_where_the_ratio_is_bounded(batch_of):
    # ratios 2 and 1/2, bound 1.5: -1.5 * 2 * logp, -.5 * -1 * logp
    logprobs = torch.tensor([0, -1.0 + LOG2, -1.0 - LOG2], requires_grad=True)
    batch = batch_of(2, advantages=[0, 2.0, -1], old_logprobs=[0, -1.0, -1.0])
    values, metrics = cispo(outputs(logprobs), batch, clip_high=0.5)
    assert values.tolist() == pytest.approx([0, -3 * (LOG2 - 1), 0.5 * (-1 - LOG2)])
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([0, -3, 0.5])
    assert metrics["clip_fraction_high"].tolist() == [False, True, False]


def test_sapo_by_hand(batch_of):
    # ρ 1: σ(0) = 1/2, so -(4 / 1) / 2 * 1 = -2 and 2 / 1.05; its slope there is -A, as without a gate
    logprobs = torch.tensor([0, -1.0, -1.0], requires_grad=True)
    batch = batch_of(2, advantages=[0, 1.0, -1], old_logprobs=[0, -1.0, -1.0])
    values, _ = sapo(outputs(logprobs), batch)
    assert values.tolist() == pytest.approx([0, -2, 2 / 1.05])
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([0, -1, 1])
    # ρ 2, τ 1: -4 σ(1) = -2.9242
    far = batch_of(1, advantages=[0, 1.0], old_logprobs=[0, -1.0])
    assert sapo(outputs([0, -1 + LOG2]), far)[0][1].item() == pytest.approx(-2.9242, abs=1e-4)


def test_the_unbiased_penalty_is_multiplied_by_the_ratio_with_its_gradient(batch_of):
    # x = .5, ρ = 2: 2 (e^-.5 - .5); slope 2 (1 - e^-.5) + the same value
    logprobs = torch.tensor([0, -1.0], requires_grad=True)
    batch = batch_of(1, ref_logprobs=[0, -1.5], old_logprobs=[0, -1.0 - LOG2])
    values, metrics = kl({"logprobs": logprobs}, batch, unbiased=True)
    k3 = math.exp(-0.5) - 0.5
    assert values[1].item() == pytest.approx(2 * k3)
    assert metrics["kl"][1].item() == pytest.approx(k3)
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert gradient[1].item() == pytest.approx(2 * (1 - math.exp(-0.5)) + 2 * k3)


def test_reinforce_by_hand(batch_of):
    values, _ = reinforce(outputs([0, -0.5, -2.0]), batch_of(2, advantages=[0, 2.0, -3]))
    assert values.tolist() == [0, 1, -6]


def test_kl_by_hand_and_its_gradient(batch_of):
    # x = .5: k3 = e^-.5 - .5; its slope 1 - e^-x
    logprobs = torch.tensor([0, -1.0, -3.0], requires_grad=True)
    batch = batch_of(2, ref_logprobs=[0, -1.5, -2.0])
    values, metrics = kl({"logprobs": logprobs}, batch)
    assert values.tolist() == pytest.approx([0, 0.1065, 0.7183], abs=5e-5)
    assert metrics["kl"].tolist() == values.tolist() and not metrics["kl"].requires_grad
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([0, 1 - math.exp(-0.5), 1 - math.e])
    assert kl({"logprobs": logprobs}, batch, type="k2")[0].tolist() == pytest.approx([0, 0.125, 0.5])


def test_the_entropy_bonus_is_minus_the_entropy(batch_of):
    assert entropy_bonus({"entropy": torch.tensor([0, 1.5])}, batch_of(1))[0].tolist() == [0, -1.5]


def test_the_difference_to_the_sampler_is_reported_when_it_is_known(batch_of):
    batch = batch_of(2, advantages=[0.0, 1, 1], sampler_logprobs=[0, -1.0, -2.5])
    _, metrics = reinforce(outputs([0, -1.25, -2.0]), batch)
    assert metrics["train_rollout_logprob_abs_diff"].tolist() == [0, 0.25, 0.5]
    assert metrics["train_rollout_logprob_abs_diff_max"].tolist() == [0, 0.25, 0.5]
    assert "train_rollout_logprob_abs_diff" not in reinforce(outputs([0, -1.0]), batch_of(1, advantages=[0.0, 1]))[1]


def _ppo(x, c):
    ratio = (x - c["old_logprobs"]).exp()
    return torch.maximum(-ratio * c["advantages"], -ratio.clamp(0.8, 1.28) * c["advantages"])


def _dual(x, c):
    plain = _ppo(x, c)
    return torch.where(c["advantages"] < 0, torch.minimum(plain, -1.5 * c["advantages"]), plain)


def _low_var(x, c):
    d = x - c["ref_logprobs"]
    return ((-d).exp() - 1 + d).clamp(-10, 10)


def _cispo(x, c):
    ratio = (x - c["old_logprobs"]).exp().detach()
    return -ratio.clamp(max=1.5) * c["advantages"] * x


def _sapo(x, c):
    ratio, tau = (x - c["old_logprobs"]).exp(), torch.where(c["advantages"] > 0, 0.7, 1.3).double()
    return -4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * c["advantages"]


def _gspo(x, c):
    ratio = (x - c["old_logprobs"])[1:].mean().exp().expand(31)
    return torch.maximum(-ratio * c["advantages"], -ratio.clamp(0.8, 1.28) * c["advantages"])


FORMULAS = {
    "cispo": (cispo, {"clip_high": 0.5}, _cispo),
    "sapo": (sapo, {"tau_positive": 0.7, "tau_negative": 1.3}, _sapo),
    "gspo": (gspo, {"clip_low": 0.2, "clip_high": 0.28}, _gspo),
    "ppo_clip": (ppo_clip, {}, _ppo),
    "ppo_clip with dual clip": (ppo_clip, {"dual_clip": 1.5}, _dual),
    "reinforce": (reinforce, {}, lambda x, c: -c["advantages"] * x),
    "kl k2": (kl, {"type": "k2"}, lambda x, c: (x - c["ref_logprobs"]) ** 2 / 2),
    "kl k3": (kl, {"type": "k3"}, lambda x, c: (c["ref_logprobs"] - x).exp() - 1 - (c["ref_logprobs"] - x)),
    "kl low_var_kl": (kl, {"type": "low_var_kl"}, _low_var),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_follow_the_formula(name: str, batch_of):
    function, options, formula = FORMULAS[name]
    draw = torch.Generator().manual_seed(0)
    names = ("old_logprobs", "ref_logprobs", "advantages")
    columns = {n: torch.randn(31, generator=draw, dtype=torch.float64) for n in names}
    x = torch.randn(31, generator=draw, dtype=torch.float64)
    ours, exact = x.float().requires_grad_(), x.clone().requires_grad_()
    batch = batch_of(30, **{n: c.float().tolist() for n, c in columns.items()})
    values, _ = function(outputs(ours), batch, **options)
    right = formula(exact, columns)
    assert torch.allclose(values.double(), right, rtol=1e-5, atol=1e-6)
    values.sum().backward()
    right.sum().backward()
    assert torch.allclose(ours.grad.double(), exact.grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "cispo", "sapo", "reinforce", "kl"])
def test_a_row_without_trained_tokens_gives_zeros(name: str, batch_of):
    batch = batch_of(0, 0, advantages=[0.0, 0], ref_logprobs=[0.0, 0], old_logprobs=[0.0, 0])
    values, _ = LOSSES[name](outputs([0.0, 0.0]), batch)
    assert values.tolist() == [0, 0]
