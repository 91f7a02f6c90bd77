"""Losses with a reference, by hand: one pair worked through every formula, then the options they share."""

from __future__ import annotations

import math

import pytest
import torch

from whet.losses import LOSSES

# Chosen: 2 tokens, L = -2, L_ref = -4. Rejected: 4 tokens, L = -5, L_ref = -4. So Δ_w = 2, Δ_r = -1, d = 3;
# means per token δ_w = 1, δ_r = -1/4, δ = 1.25. With β = .5: βd = 1.5, βΔ_w = 1, βΔ_r = -.5, βδ = .625.
ROWS = ([-1.0, -1.0], [-1.25] * 4)
REFS = ([-2.0, -2.0], [-1.0] * 4)

# log(1 + e^-x) at 1.5: .201413, -1.5: 1.701413, 1: .313262, -1: 1.313262, .5: .474077, .625: .428701, .75: .386871.
BY_HAND = {
    "sigmoid": ({}, 0.201413),
    "sigmoid with smoothing": ({"label_smoothing": 0.1}, 0.9 * 0.201413 + 0.1 * 1.701413),
    "sigmoid_norm": ({}, 0.428701),
    "robust": ({"label_smoothing": 0.1}, (0.9 * 0.201413 - 0.1 * 1.701413) / 0.8),
    "robust without smoothing": ({}, 0.201413),
    "hinge": ({}, 0),  # 1 - 1.5 < 0
    "hinge within the margin": ({"beta": 0.2}, 0.4),  # 1 - .2 * 3
    "ipo": ({}, 0.0625),  # (1.25 - 1)^2
    "ipo at another beta": ({"beta": 0.1}, 14.0625),  # (1.25 - 5)^2
    # σ(1.5) = .817574: .817574 (-.201413 - log .9) + .182426 (-1.701413 - log .1)
    "exo_pair": ({"label_smoothing": 0.1}, 0.817574 * (-0.201413 + 0.105361) + 0.182426 * (-1.701413 + 2.302585)),
    # g = σ(1.5 / .5) = .952574, e^-1.5 = .223130
    "discopop": ({"tau": 0.5}, 0.047426 * 0.201413 + 0.952574 * 0.223130),
    "nca_pair": ({}, 0.313262 + 0.5 * 1.313262 + 0.5 * 0.474077),
    "bco_pair": ({}, 0.386871 + 0.386871),  # κ = .25: 1 - .25 and -(-.5 - .25)
    "bco_pair without a running mean": ({"running_mean": False}, 0.313262 + 0.474077),
    "sppo_hard": ({}, 1),  # (2 - 1)^2 + (-1 + 1)^2
    "sppo_hard at another beta": ({"beta": 0.25}, 1),  # (2 - 2)^2 + (-1 + 2)^2
    "apo_zero": ({}, 0.268941 + 0.377541),  # 1 - σ(1) + σ(-.5)
    "apo_down": ({}, 0.731059 + 0.182426),  # σ(1) + 1 - σ(1.5)
    "aot": ({}, 0.201413),  # one pair is its own partner: x = 3, y = 0
    "aot_unpaired": ({"label_smoothing": 0.1}, 0.9 * 0.201413 + 0.1 * 1.701413),
}
COLUMNS = {"reward_mean": [0.25, 0.25], "aot_reference": [0.0], "aot_chosen": [2.0], "aot_rejected": [-1.0]}


@pytest.mark.parametrize("case", BY_HAND)
def test_each_loss_by_hand(case: str, rows_of):
    options, right = BY_HAND[case]
    out, batch = rows_of(*ROWS, refs=REFS, **COLUMNS)
    values, metrics = LOSSES[case.split()[0]](out, batch, **{"beta": 0.5, **options})
    assert values.tolist() == pytest.approx([right], abs=3e-6)
    beta = options.get("beta", 0.5)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "rewards/chosen": 2 * beta,
            "rewards/rejected": -beta,
            "rewards/margins": 3 * beta,
            "rewards/accuracies": 1,
            "logps/chosen": -2,
            "logps/rejected": -5,
        }
    )
    assert not any(value.requires_grad for value in metrics.values())


def test_beta_is_a_tenth_unless_it_is_given(rows_of):
    out, batch = rows_of(*ROWS, refs=REFS, **COLUMNS)
    for name in dict.fromkeys(case.split()[0] for case in BY_HAND):
        assert torch.equal(LOSSES[name](out, batch)[0], LOSSES[name](out, batch, beta=0.1)[0]), name


def test_a_pair_ranked_wrongly_is_not_accurate(rows_of):
    out, batch = rows_of(*ROWS[::-1], refs=REFS[::-1])
    metrics = LOSSES["sigmoid"](out, batch)[1]
    assert metrics["rewards/accuracies"].tolist() == [0] and metrics["rewards/margins"].item() == pytest.approx(-0.3)


@pytest.mark.parametrize(
    ("divergence", "right"),
    [
        # d of the scores at Δ_w = 2, Δ_r = -1
        ({"f_divergence": "reverse_kl"}, 3),
        ({"f_divergence": "forward_kl"}, math.e - math.exp(-2)),  # 1 - 1/t
        ({"f_divergence": "js"}, math.log(math.exp(2) / (1 + math.exp(2))) - math.log(1 / (1 + math.e))),
        ({"f_divergence": "alpha"}, 2 * (math.exp(0.5) - math.exp(-1))),  # α = .5: 2 - 2 / sqrt(t)
        ({"f_divergence": "alpha", "f_alpha": 2.0}, math.exp(2) - math.exp(-1)),  # t - 1
    ],
)
def test_divergences_by_hand(divergence: dict, right: float, rows_of):
    out, batch = rows_of(*ROWS, refs=REFS)
    values, metrics = LOSSES["hinge"](out, batch, beta=0.05, **divergence)
    assert values.item() == pytest.approx(1 - 0.05 * right, rel=1e-5)
    assert metrics["rewards/margins"].item() == pytest.approx(0.05 * 3), "rewards stay log-ratios"


def test_a_mean_of_scores_is_over_the_scores_themselves(rows_of):
    # js scores: log 2 + log σ(2) = .566219 over 2 tokens, log 2 + log σ(-1) = -.620115 over 4
    out, batch = rows_of(*ROWS, refs=REFS)
    values, _ = LOSSES["ipo"](out, batch, beta=0.5, f_divergence="js")
    assert values.item() == pytest.approx((0.566219 / 2 + 0.620115 / 4 - 1) ** 2, abs=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop"])
def test_alpha_divergence_has_both_kls_as_its_ends(name: str, rows_of):
    out, batch = rows_of(*ROWS, refs=REFS)
    for alpha, end in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        values = LOSSES[name](out, batch, f_divergence="alpha", f_alpha=alpha)[0]
        assert torch.allclose(values, LOSSES[name](out, batch, f_divergence=end)[0])


def test_tokens_beyond_the_shorter_completion_count_ld_alpha(rows_of):
    # the rejected completion has 2 tokens more: Δ_r = 2 (-.25) + .5 * 2 (-.25) = -.75, L_r = -2.5 - 1.25
    out, batch = rows_of(*ROWS, refs=REFS)
    values, metrics = LOSSES["hinge"](out, batch, beta=0.1, ld_alpha=0.5)
    assert values.item() == pytest.approx(1 - 0.275)
    assert metrics["logps/rejected"].item() == pytest.approx(-3.75)
    assert metrics["rewards/rejected"].item() == pytest.approx(-0.075)
    (gradient,) = torch.autograd.grad(values.sum(), out["logprobs"])
    assert gradient.tolist() == pytest.approx([0, -0.1, -0.1, 0, 0.1, 0.1, 0.05, 0.05])


def test_ld_alpha_counts_trained_tokens_only(batch_of):
    # rejected: trained at places 2 and 4; the shorter completion has one trained token, so the second one is beyond
    batch = batch_of(3, 4, per_unit=2, ref_logprobs=[0.0] * 9)
    mask = torch.tensor([False, True, False, False, False, False, True, False, True])
    object.__setattr__(batch, "loss_mask", mask)
    logprobs = torch.full((9,), -1.0)
    assert LOSSES["hinge"]({"logprobs": logprobs}, batch, ld_alpha=0.0)[1]["logps/rejected"].tolist() == [-1]
    assert LOSSES["hinge"]({"logprobs": logprobs}, batch, ld_alpha=1.0)[1]["logps/rejected"].tolist() == [-2]


def test_wpo_weighs_a_pair_by_how_likely_the_policy_would_have_written_it(rows_of):
    # mean(log p - log Σp²): chosen -1 + .5 = -.5, rejected -1.25 + .75 = -.5; weight e^-1, and no gradient from it
    out, batch = rows_of(*ROWS, refs=REFS, **COLUMNS)
    squares = torch.tensor([0, -0.5, -0.5, 0, *[-0.75] * 4], requires_grad=True)
    for name in ("sigmoid", "ipo", "apo_down"):
        plain = LOSSES[name](out, batch)[0]
        values = LOSSES[name](out | {"log_sum_sq_probs": squares}, batch, wpo=True)[0]
        assert values.item() == pytest.approx(plain.item() / math.e)
        gradients = [torch.autograd.grad(x.sum(), out["logprobs"], retain_graph=True)[0] for x in (values, plain)]
        assert torch.allclose(gradients[0], gradients[1] / math.e)
        assert torch.autograd.grad(values.sum(), squares, allow_unused=True) == (None,)


def test_what_a_loss_does_not_honour_it_does_not_take(rows_of):
    out, batch = rows_of(*ROWS, refs=REFS, **COLUMNS)
    for name, option in (("hinge", "label_smoothing"), ("apo_zero", "f_divergence"), ("aot", "wpo")):
        with pytest.raises(TypeError, match=option):
            LOSSES[name](out, batch, **{option: 0.1})
