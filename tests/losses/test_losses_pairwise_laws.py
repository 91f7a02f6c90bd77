"""What holds for every loss on pairs and on labelled completions, whatever its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from whet.batch import Batch, collate
from whet.config.plugin import options_of, validated_options
from whet.errors import ConfigError
from whet.losses import LOSSES
from whet.losses.transport import aot_partners
from whet.types import Sample, Unit

BASE = {"beta", "ld_alpha"}
DIVERGENCE = {"f_divergence", "f_alpha"}
WITH_REFERENCE = {
    "sigmoid": BASE | DIVERGENCE | {"wpo", "label_smoothing"},
    "sigmoid_norm": BASE | DIVERGENCE | {"wpo"},
    "robust": BASE | DIVERGENCE | {"wpo", "label_smoothing"},
    "hinge": BASE | DIVERGENCE | {"wpo"},
    "ipo": BASE | DIVERGENCE | {"wpo"},
    "exo_pair": BASE | DIVERGENCE | {"wpo", "label_smoothing"},
    "discopop": BASE | DIVERGENCE | {"wpo", "tau"},
    "nca_pair": BASE | {"wpo"},
    "bco_pair": BASE | {"wpo", "running_mean"},
    "sppo_hard": BASE | {"wpo"},
    "apo_zero": BASE | {"wpo"},
    "apo_down": BASE | {"wpo"},
    "aot": BASE | {"label_smoothing"},
    "aot_unpaired": BASE | {"label_smoothing"},
}
WITHOUT_REFERENCE = {
    "simpo": {"beta", "gamma", "gamma_ratio", "label_smoothing"},
    "cpo": {"beta", "label_smoothing"},
    "orpo": {"beta"},
}
LABELLED = dict.fromkeys(
    ("kto", "apo_zero_unpaired", "bco"), frozenset({"beta", "desirable_weight", "undesirable_weight"})
)
OPTIONS = WITH_REFERENCE | WITHOUT_REFERENCE | LABELLED

VARIANTS = [(name, {}) for name in OPTIONS]
VARIANTS += [(name, {"ld_alpha": 0.3, "beta": 0.7}) for name in WITH_REFERENCE]
VARIANTS += [(name, {"wpo": True}) for name, options in WITH_REFERENCE.items() if "wpo" in options]
VARIANTS += [
    (name, {"f_divergence": divergence})
    for name, options in WITH_REFERENCE.items()
    if "f_divergence" in options
    for divergence in ("forward_kl", "js", "alpha")
]
each_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)


def laid_out(lengths: list[int], seed: int = 0, scale: float = 1.0) -> tuple[dict[str, Tensor], Batch]:
    """Outputs and batch of random pairs of these numbers of trained tokens, behind prompts of some length.

    Where nothing is trained, logprobs are NaN: no loss may look there.
    """
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        prompt = int(torch.randint(1, 4, (), generator=draw))
        samples.append(Sample([1] * (prompt + length), [False] * prompt + [True] * length))
    batch = collate([Unit(str(i), pair) for i, pair in enumerate(zip(samples[0::2], samples[1::2], strict=True))])

    def random(size: int) -> Tensor:
        return torch.rand(size, generator=draw)

    def token(spread: float) -> Tensor:
        return torch.where(batch.loss_mask, -scale * spread * random(batch.num_tokens), torch.nan)

    rows = batch.num_sequences
    batch = batch.with_columns(
        ref_logprobs=token(2),
        labels=torch.tensor([1.0, 0]).repeat(rows // 2),
        kl_baseline=torch.full((rows,), 0.3),
        reward_mean=torch.full((rows,), -0.2),
    )
    logprobs = token(2)
    squares = torch.maximum(token(1) / scale, 2 * logprobs)  # Σp² is at least p² of the one token
    out = {"logprobs": logprobs, "log_sum_sq_probs": squares}
    return out, batch.with_columns(**aot_partners(out["logprobs"], batch))


def value_and_gradient(name: str, out: dict[str, Tensor], batch: Batch, **options) -> tuple[Tensor, Tensor]:
    leaf = out["logprobs"].detach().clone().requires_grad_()
    values, _ = LOSSES[name](out | {"logprobs": leaf}, batch, **options)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


@pytest.mark.parametrize("name", OPTIONS)
def test_a_loss_has_the_options_that_it_honours_and_no_others(name: str):
    assert set(options_of(LOSSES[name]).model_fields) == OPTIONS[name]


REFUSED = {
    "robust": ({"label_smoothing": 0.5}, "label_smoothing must be less than 0.5"),
    "exo_pair": ({"label_smoothing": 0.0}, "label_smoothing must be greater than 0"),
    "sigmoid": ({"beta": 0}, "beta must be greater than 0"),
    "hinge": ({"label_smoothing": 0.1}, "label_smoothing is not an option"),
    "aot": ({"wpo": True}, "wpo is not an option"),
    "nca_pair": ({"f_divergence": "js"}, "f_divergence is not an option"),
    "ipo": ({"f_alpha": 0.3}, "only f_divergence: alpha has a coefficient, but f_divergence is 'reverse_kl'"),
    "sigmoid_norm": ({"f_divergence": "renyi"}, "f_divergence must be"),
    "apo_zero": ({"ld_alpha": 1.1}, "ld_alpha must be at most 1"),
    "discopop": ({"tau": 1.5}, "tau must be at most 1"),
    "simpo": ({"gamma": 1.0, "gamma_ratio": 0.5}, "gamma_ratio: gamma is set too"),
    "cpo": ({"label_smoothing": 0.6}, "label_smoothing must be at most 0.5"),
    "kto": ({"desirable_weight": -1}, "desirable_weight must be at least 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_cannot_work_is_refused_before_anything_runs(name: str):
    options, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        validated_options(LOSSES[name], options, where="loss")


def test_f_alpha_goes_with_the_alpha_divergence():
    options = validated_options(LOSSES["ipo"], {"f_divergence": "alpha", "f_alpha": 0.3}, where="loss")
    assert (options["f_divergence"], options["f_alpha"]) == ("alpha", 0.3)


@each_variant
def test_one_finite_value_each_and_no_gradient_where_nothing_is_trained(name: str, options: dict):
    out, batch = laid_out([3, 5, 1, 1, 6, 2])
    values, gradient = value_and_gradient(name, out, batch, **options)
    assert values.shape == ((6,) if name in LABELLED else (3,)) and values.dtype == torch.float32
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all()
    assert not gradient[~batch.loss_mask].any()
    assert gradient[batch.loss_mask].all() or name == "hinge", "only a hinge is ever content"


@each_variant
def test_micro_batches_add_up_to_the_whole(name: str, options: dict):
    out, batch = laid_out([3, 5, 1, 1, 6, 2, 4, 4, 2, 7])
    whole, gradient = value_and_gradient(name, out, batch, **options)
    for parts in ([[0], [1], [2], [3], [4]], [[1, 4], [0, 2, 3]]):
        values, gradients = [], torch.zeros_like(gradient)
        for units in parts:
            tokens = torch.isin(batch.unit_ids, torch.tensor(units))[batch.sequence_ids]
            part = {key: value[tokens] for key, value in out.items()}
            v, gradients[tokens] = value_and_gradient(name, part, batch.select(units), **options)
            values.append(v)
        assert torch.allclose(torch.cat(values).sum(), whole.sum(), rtol=1e-5)
        assert torch.allclose(gradients, gradient, rtol=1e-5, atol=1e-7)


@each_variant
@pytest.mark.parametrize("lengths", [[0, 3], [3, 0], [0, 0], [0, 3, 2, 4]], ids=str)
def test_rows_without_a_trained_token_are_harmless(name: str, options: dict, lengths: list[int]):
    out, batch = laid_out(lengths)
    values, gradient = value_and_gradient(name, out, batch, **options)
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all()


@each_variant
@pytest.mark.parametrize("scale", [1e-8, 300.0, 3e4])
@pytest.mark.parametrize("swap", [False, True], ids=["chosen far below", "rejected far below"])
def test_very_large_logits_stay_finite(name: str, options: dict, scale: float, swap: bool):
    # Logprobs of logits in the ten thousands: one completion certain, the other impossible.
    out, batch = laid_out([4, 4, 3, 5], scale=scale)
    sides = torch.tensor([1.0, 0, 1, 0] if not swap else [0.0, 1, 0, 1])[batch.sequence_ids]
    batch = batch.with_columns(ref_logprobs=batch["ref_logprobs"] * (1 - sides))
    out |= {"logprobs": out["logprobs"] * sides, "log_sum_sq_probs": out["log_sum_sq_probs"] * sides}
    batch = batch.with_columns(**aot_partners(out["logprobs"], batch))
    values, gradient = value_and_gradient(name, out, batch, **options)
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all()


@each_variant
def test_bf16_logprobs_are_summed_in_float32(name: str, options: dict):
    out, batch = laid_out([3, 50, 40, 1, 6, 2])
    narrow = {key: value.bfloat16() for key, value in out.items()}
    wide = {key: value.float() for key, value in narrow.items()}
    values, gradient = value_and_gradient(name, narrow, batch, **options)
    right, exact = value_and_gradient(name, wide, batch, **options)
    assert values.dtype == torch.float32 and torch.equal(values, right)
    assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, exact.bfloat16())
    metrics, theirs = (LOSSES[name](logprobs, batch, **options)[1] for logprobs in (narrow, wide))
    assert all(torch.equal(metrics[key].nan_to_num(), theirs[key].nan_to_num()) for key in theirs)


# apo_down lowers both completions where the chosen one is ahead; discopop gives way on pairs ranked wrongly.
@pytest.mark.parametrize("name", [n for n in WITH_REFERENCE | WITHOUT_REFERENCE if n not in ("apo_down", "discopop")])
def test_the_chosen_completion_becomes_likelier_and_the_rejected_one_less_likely(name: str):
    out, batch = laid_out([3, 5, 2, 4])
    _, gradient = value_and_gradient(name, out, batch)
    chosen = (batch["labels"] == 1)[batch.sequence_ids]
    assert (gradient[batch.loss_mask & chosen] < 0).all() and (gradient[batch.loss_mask & ~chosen] > 0).all()


@pytest.mark.parametrize(
    ("name", "options"), [("sigmoid", {}), ("cpo", {}), ("simpo", {"gamma": 0.0}), ("exo_pair", {})], ids=str
)
def test_half_of_the_labels_wrong_is_no_information(name: str, options: dict):
    out, batch = laid_out([3, 5])
    rows = [torch.nonzero(batch.sequence_ids == i)[:, 0] for i in (1, 0)]
    order = torch.cat(rows)
    samples = [Sample(batch.tokens[row].tolist(), batch.loss_mask[row].tolist()) for row in rows]
    swapped = collate([Unit("0", tuple(samples))]).with_columns(ref_logprobs=batch["ref_logprobs"][order])
    for smoothing, same in ((0.5, True), (0.1, False)):
        there = LOSSES[name](out, batch, label_smoothing=smoothing, **options)[0]
        back = LOSSES[name](
            {key: value[order] for key, value in out.items()}, swapped, label_smoothing=smoothing, **options
        )[0]
        assert torch.allclose(there, back) == same


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "robust"])
def test_a_policy_that_is_the_reference_costs_log_two(name: str):
    out, batch = laid_out([3, 5, 2, 4])
    batch = batch.with_columns(ref_logprobs=out["logprobs"])
    assert LOSSES[name](out, batch)[0].tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_ld_alpha_of_one_changes_nothing_and_of_zero_cuts_the_longer_completion(name: str):
    out, batch = laid_out([3, 5, 6, 2])
    assert torch.equal(LOSSES[name](out, batch, ld_alpha=1.0)[0], LOSSES[name](out, batch)[0])
    leaf = out["logprobs"].clone().requires_grad_()
    partners = aot_partners(leaf, batch, ld_alpha=0.0)
    values, _ = LOSSES[name](out | {"logprobs": leaf}, batch.with_columns(**partners), ld_alpha=0.0)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    reached = batch.sum_tokens((gradient != 0).float())
    assert reached.tolist() == [3, 3, 2, 2]


def test_a_robust_loss_over_flipped_labels_has_the_mean_of_the_clean_one():
    # E over labels flipped with probability ε of the robust loss is the plain loss of the right order.
    out, batch = laid_out([3, 5])
    batch_back = batch.with_columns(ref_logprobs=2 * out["logprobs"] - batch["ref_logprobs"])  # Δ -> -Δ
    there = LOSSES["robust"](out, batch, label_smoothing=0.2)[0]
    back = LOSSES["robust"](out, batch_back, label_smoothing=0.2)[0]
    assert torch.allclose(0.8 * there + 0.2 * back, LOSSES["sigmoid"](out, batch)[0])
