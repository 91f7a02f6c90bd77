"""Losses of distillation: worked numbers, the mixture with hard targets, and what the k likeliest words leave out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from whet.losses import LOSSES, create_loss
from whet.losses.base import needed
from whet.losses.distill import Divergence, TopK, divergence, gkd, gkd_topk
from whet.methods import Term

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
LOG2 = math.log(2)


def distributions(count: int, vocabulary: int, *, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities [count, vocabulary] of a student, with gradient, and a teacher, in float64."""
    draw = torch.Generator().manual_seed(count)
    logits = torch.randn(2, count, vocabulary, generator=draw, dtype=torch.float64) * size
    student, teacher = logits.log_softmax(-1)
    return student.requires_grad_(), teacher


def defined(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The divergence [M] of whole distributions, by its definition."""
    s, t = student.exp(), teacher.exp()
    if beta in (0, 1):
        return (s * (s / t).log()).sum(-1) if beta else (t * (t / s).log()).sum(-1)
    mixture = beta * t + (1 - beta) * s
    return beta * (t * (t / mixture).log()).sum(-1) + (1 - beta) * (s * (s / mixture).log()).sum(-1)


def from_words(batch_of, student: Tensor, teacher: Tensor, ids: Tensor, beta: float, **options) -> Tensor:
    """`gkd_topk` [M] of the words `ids` [M, k] behind one token of prompt."""
    padding = torch.zeros(1, ids.shape[1])
    columns = {"teacher_topk_ids": ids, "teacher_topk_logprobs": teacher.gather(1, ids).float()}
    columns = {name: torch.cat([padding.to(x.dtype), x]).tolist() for name, x in columns.items()}
    logprobs = torch.cat([padding, student.gather(1, ids).float()])
    nothing = torch.zeros(len(ids) + 1)
    out = {TopK(1.0): logprobs, "logprobs": nothing, "correct": nothing}
    return gkd_topk(out, batch_of(len(ids), **columns), beta=beta, **options)[0]


def likeliest(teacher: Tensor, k: int) -> Tensor:
    return teacher.topk(k, -1).indices


# --- the whole distribution --------------------------------------------------------------------------


def test_gkd_is_the_divergence_it_asks_for(batch_of):
    out = {Divergence(0.5, 2.0): torch.tensor([0, 0.25]), "logprobs": torch.tensor([0, -1.5]), "correct": torch.ones(2)}
    values, metrics = gkd(out, batch_of(1), beta=0.5, temperature=2.0)
    assert values.tolist() == [0, 0.25]
    assert metrics["divergence"].tolist() == [0, 0.25] and metrics["cross_entropy"].tolist() == [0, 1.5]
    assert metrics["mean_token_accuracy"].tolist() == [1, 1]


@pytest.mark.parametrize(("hard", "value"), [(0.0, 0.25), (0.2, 0.5), (1.0, 1.5)])
def test_hard_mixes_the_cross_entropy_in(hard: float, value: float, batch_of):
    # (1 - hard) .25 + hard 1.5
    logprobs = torch.tensor([0, -1.5], requires_grad=True)
    soft = torch.tensor([0, 0.25], requires_grad=True)
    values, metrics = gkd({Divergence(0.5, 1.0): soft, "logprobs": logprobs, "correct": soft}, batch_of(1), hard=hard)
    assert values[1].item() == pytest.approx(value)
    values.sum().backward()
    assert soft.grad is not None and soft.grad.tolist() == pytest.approx([1 - hard] * 2)
    assert (logprobs.grad is None) if hard == 0 else (logprobs.grad.tolist() == pytest.approx([-hard] * 2))
    assert not any(metric.requires_grad for metric in (metrics["divergence"], metrics["cross_entropy"]))


# --- the likeliest words -----------------------------------------------------------------------------


def test_the_likeliest_word_and_the_rest_by_hand(batch_of):
    # T = (1/2, 1/4, 1/4), S = (1/4, 1/2, 1/4), k = 1: outcomes (1/2, 1/2) and (1/4, 3/4)
    student, teacher = torch.tensor([[0.25, 0.5, 0.25]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()
    by_hand = {
        0.0: LOG2 / 2 + math.log(2 / 3) / 2,  # 1/2 ln 2 + 1/2 ln (1/2 / 3/4)
        1.0: -LOG2 / 4 + 0.75 * math.log(1.5),  # 1/4 ln 1/2 + 3/4 ln (3/4 / 1/2)
        # M = (3/8, 5/8): 1/2 (1/2 ln 4/3 + 1/2 ln 4/5) + 1/2 (1/4 ln 2/3 + 3/4 ln 6/5)
        0.5: (math.log(4 / 3) + math.log(4 / 5)) / 4 + math.log(2 / 3) / 8 + 3 / 8 * math.log(6 / 5),
    }
    for beta, value in by_hand.items():
        values = from_words(batch_of, student, teacher, torch.tensor([[0]]), beta)
        assert values.tolist() == pytest.approx([0, value], rel=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_all_words_give_the_exact_divergence_and_its_gradient(beta: float, batch_of):
    student, teacher = distributions(9, 11)
    ids = torch.stack([torch.randperm(11, generator=torch.Generator().manual_seed(i)) for i in range(9)])
    values, right = from_words(batch_of, student, teacher, ids, beta)[1:].double(), defined(student, teacher, beta)
    assert torch.allclose(values, right, rtol=1e-5, atol=2e-6)
    # Through the softmax, as logits receive it: what all log-probabilities have in common does not matter.
    ours, exact = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (values, right))
    ours, exact = (g - student.exp().detach() * g.sum(-1, keepdim=True) for g in (ours, exact))
    assert torch.allclose(ours, exact, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_fewer_words_give_a_lower_bound_that_rises_to_the_divergence(beta: float, batch_of):
    student, teacher = distributions(40, 12)
    exact = defined(student, teacher, beta)
    before = torch.zeros(40)
    for k in (1, 2, 4, 8, 11, 12):
        values = from_words(batch_of, student, teacher, likeliest(teacher, k), beta)[1:].detach()
        assert (values <= exact + 1e-5).all() and (values >= before - 1e-5).all()
        before = values
    assert (before - exact).abs().max() < 1e-5


@pytest.mark.parametrize("beta", BETAS)
def test_the_order_of_the_words_does_not_matter(beta: float, batch_of):
    student, teacher = distributions(9, 20)
    ids = likeliest(teacher, 5)
    values, turned = (from_words(batch_of, student, teacher, x, beta) for x in (ids, ids.flip(-1)))
    assert torch.allclose(values, turned, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients_with_a_rest_follow_the_definition_in_float64(beta: float, batch_of):
    student, teacher = distributions(15, 30, size=2.0)
    ids = likeliest(teacher, 4)

    def merged(logp: Tensor) -> Tensor:
        rest = torch.ones_like(logp).scatter(1, ids, 0) * logp.exp()
        return torch.cat([logp.gather(1, ids), rest.sum(-1, keepdim=True).log()], -1)

    # The student's log-probabilities stay on the simplex through a softmax of their own.
    values = from_words(batch_of, student.log_softmax(-1), teacher, ids, beta)[1:].double()
    right = defined(merged(student.log_softmax(-1)), merged(teacher), beta)
    assert torch.allclose(values, right, rtol=1e-4, atol=1e-6)
    ours, exact = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (values, right))
    assert torch.allclose(ours, exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_certainty_and_impossibility_stay_finite(beta: float, batch_of):
    """A teacher who is sure to the last bit, who rules a word out, and a student sure of another word."""
    teacher = torch.tensor([[0.0, -torch.inf], [-0.5, -torch.inf], [0.0, -200.0], [-1e-8, -30.0]])
    student = torch.tensor([[0.0, -300.0], [-1.0, -300.0], [-250.0, 0.0], [0.0, 0.0]], requires_grad=True)
    ids = torch.tensor([[0, 1]] * 4)
    values = from_words(batch_of, student, teacher, ids, beta)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.isfinite().all() and gradient.isfinite().all()
    assert abs(values[1].item()) < 1e-5, "both are sure of the same"


@pytest.mark.parametrize("name", ["gkd", "gkd_topk"])
def test_rows_without_trained_tokens_give_zeros(name: str, batch_of):
    columns = {"teacher_topk_ids": [[0, 1], [0, 1]], "teacher_topk_logprobs": [[0.0, 0.0], [0.0, 0.0]]}
    batch = batch_of(0, 0, **(columns if name == "gkd_topk" else {}))
    nothing = torch.zeros(2)
    out = {"logprobs": nothing, "correct": nothing, TopK(1.0): torch.zeros(2, 2), Divergence(0.5, 1.0): nothing}
    assert LOSSES[name](out, batch)[0].tolist() == [0, 0]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_bf16_log_probabilities_are_close(beta: float):
    student, teacher = distributions(50, 8)
    found = divergence(student.bfloat16(), teacher.bfloat16(), beta)
    assert (found - defined(student, teacher, beta)).abs().max() < 0.05


# --- what is asked for -------------------------------------------------------------------------------


def test_the_options_say_what_the_model_is_asked_for():
    assert needed(gkd, {}) == {"logprobs", "correct", Divergence(0.5, 1.0)}
    assert needed(gkd, {"beta": 0, "temperature": 2, "hard": 0.5}) == {"logprobs", "correct", Divergence(0.0, 2.0)}
    assert needed(gkd_topk, {"beta": 0.0, "temperature": 3.0}) == {"logprobs", "correct", TopK(3.0)}
    assert Term("gkd", gkd, "token", options={"beta": 1.0}).outputs == needed(gkd, {"beta": 1.0})


def test_bound_options_are_not_asked_for_twice():
    bound = create_loss("kd", beta=0.1, temperature=2.0)
    assert bound.outputs == {"logprobs", "correct", Divergence(0.1, 2.0)}
    assert Term("kd", bound, "token").outputs == bound.outputs
    assert bound.reads == {"teacher_hidden"} and bound.per == "token"
    assert create_loss("sft").requests({}) == frozenset()
