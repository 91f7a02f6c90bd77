"""The chunked divergence: worked numbers, float64 math, TRL's own function, and no [T, V] tensor anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from heads import Head, Largest, rows_per_chunk
from torch import Tensor

from whet.tensor.divergence import Divergence, token_divergence
from whet.tensor.head import read_head
from whet.tensor.logprobs import Tokens, Words, token_logprobs, top_logprobs, topk_logprobs

BETAS = [0, 0.1, 0.5, 0.9, 1]


@dataclass
class Problem:
    """A student and a teacher with different widths, and perhaps different vocabularies."""

    hidden: Tensor
    head: Head
    teacher_hidden: Tensor
    teacher_head: Head

    def divergence(self, **options) -> Tensor:
        return token_divergence(self.hidden, self.head, self.teacher_hidden, self.teacher_head, **options)

    def to(self, dtype: torch.dtype) -> Problem:
        """A copy in another type, whose student has gradients."""
        tensors = (self.hidden, self.head.weight, self.head.bias)
        hidden, weight, bias = (None if x is None else x.to(dtype, copy=True).requires_grad_() for x in tensors)
        assert hidden is not None and weight is not None
        t = self.teacher_head
        teacher = Head(t.weight.to(dtype), None if t.bias is None else t.bias.to(dtype), t.scale, t.softcap)
        head = Head(weight, bias, self.head.scale, self.head.softcap)
        return Problem(hidden, head, self.teacher_hidden.to(dtype), teacher)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head.weight, self.head.bias) if x is not None]


def problem(
    count: int = 13, words: int = 37, teacher_words: int = 37, *, bias=False, size=1.0, student=None, teacher=None
) -> Problem:
    """Drawn from a fixed seed; `student` and `teacher` are options of the two heads."""
    draw = torch.Generator().manual_seed(count)

    def head(vocabulary: int, width: int, options: dict | None) -> Head:
        weight = torch.randn(vocabulary, width, generator=draw)
        return Head(weight, torch.randn(vocabulary, generator=draw) if bias else None, **(options or {}))

    hidden, teacher_hidden = (torch.randn(count, width, generator=draw) * size for width in (8, 6))
    return Problem(hidden, head(words, 8, student), teacher_hidden, head(teacher_words, 6, teacher))


def logits_of(hidden: Tensor, head: Head, vocabulary: int | None = None) -> Tensor:
    """[M, V] by the definition of a head."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits[:, :vocabulary]


def defined(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The divergence [M] by the definition, of log-probabilities [M, V]."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1)

    if beta in (0, 1):
        return kl(student, teacher) if beta else kl(teacher, student)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def exact(p: Problem, *, beta: float, temperature: float = 1.0) -> Tensor:
    shared = min(len(p.head.weight), len(p.teacher_head.weight))
    student = logits_of(p.hidden, p.head, shared)
    teacher = logits_of(p.teacher_hidden, p.teacher_head, shared)
    return defined((student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1), beta)


def gradients(values: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of a weighted sum of `values`."""
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(values.shape, generator=draw, dtype=torch.float64)
    return [g.double() for g in torch.autograd.grad((values.double() * weights).sum(), leaves)]


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert (ours.double() - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


def agree(p: Problem, *, tolerance: float = 1e-5, dtype=torch.float32, **options) -> None:
    """Value and gradients in `dtype` are those of the definition in float64."""
    ours, right = p.to(dtype), p.to(torch.float64)
    found, expected = ours.divergence(**options), exact(right, beta=options["beta"], temperature=options["temperature"])
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found.detach(), expected.detach(), tolerance)
    for a, b in zip(gradients(found, ours.leaves), gradients(expected, right.leaves), strict=True):
        assert_close(a, b, tolerance)


# --- numbers -----------------------------------------------------------------------------------------


def of_distributions(student: list[list[float]], teacher: list[list[float]]) -> Problem:
    """Heads whose words have just these probabilities: hidden states choose a row of log-probabilities."""
    p, q = torch.tensor(student).log(), torch.tensor(teacher).log()
    return Problem(torch.eye(len(p)), Head(p.T.contiguous()), torch.eye(len(q)), Head(q.T.contiguous()))


BY_HAND = {
    # T = (1/2, 1/4, 1/4), S = (1/4, 1/2, 1/4)
    0: math.log(2) / 4,  # 1/2 ln 2 + 1/4 ln 1/2
    1: math.log(2) / 4,  # 1/4 ln 1/2 + 1/2 ln 2
    # M = (3/8, 3/8, 1/4): KL(T || M) = KL(S || M) = 1/2 ln 4/3 + 1/4 ln 2/3
    0.5: math.log(4 / 3) / 2 + math.log(2 / 3) / 4,
    # M = (7/16, 5/16, 1/4): 3/4 (1/2 ln 8/7 + 1/4 ln 4/5) + 1/4 (1/4 ln 4/7 + 1/2 ln 8/5)
    0.75: 0.75 * (math.log(8 / 7) / 2 + math.log(4 / 5) / 4) + 0.25 * (math.log(4 / 7) / 4 + math.log(8 / 5) / 2),
}


@pytest.mark.parametrize("beta", BY_HAND)
def test_three_words_by_hand(beta: float):
    p = of_distributions([[0.25, 0.5, 0.25]], [[0.5, 0.25, 0.25]])
    assert p.divergence(beta=beta).item() == pytest.approx(BY_HAND[beta], rel=1e-5)


def test_forward_and_reverse_are_told_apart():
    # T = (1/2, 1/2, ~0), S = (1/4, 1/4, 1/2): forward ln 2 = .69; reverse is large, as S has words that T never says
    p = of_distributions([[0.25, 0.25, 0.5]], [[0.5, 0.5, 1e-12]])
    assert p.divergence(beta=0).item() == pytest.approx(math.log(2), rel=1e-5)
    reverse = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-12)
    assert p.divergence(beta=1).item() == pytest.approx(reverse, rel=1e-5)


def test_temperature_by_hand():
    # logits (0, ln 4) and (ln 4, 0) at temperature 2: S = (1/3, 2/3), T = (2/3, 1/3): KL = 1/3 ln 2
    p = of_distributions([[1.0, 4.0]], [[4.0, 1.0]])
    assert p.divergence(beta=0, temperature=2).item() == pytest.approx(math.log(2) / 3, rel=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_there_is_no_divergence_from_oneself(beta: float):
    p = problem()
    hidden = p.hidden.clone().requires_grad_()
    values = token_divergence(hidden, p.head, p.hidden, p.head, beta=beta)
    (gradient,) = torch.autograd.grad(values.sum(), hidden)
    assert values.abs().max() < 1e-6 and gradient.abs().max() < 1e-5


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale and softcap of the student": {"student": {"scale": 2.0, "softcap": 3.0}},
    "scale and softcap of the teacher": {"teacher": {"scale": 0.5, "softcap": 2.0}},
    "everything": {"bias": True, "student": {"scale": 0.5, "softcap": 4.0}, "teacher": {"softcap": 6.0}},
}
SIZES = {"the same words": (37, 37), "padding of the student": (40, 37), "padding of the teacher": (37, 64)}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
def test_values_and_gradients_are_those_of_the_definition(options: dict, temperature: float, beta: float):
    agree(problem(**options), beta=beta, temperature=temperature)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_vocabularies_are_cut_to_what_they_share(sizes: tuple[int, int], beta: float):
    agree(problem(13, *sizes, bias=True, student={"softcap": 5.0}), beta=beta, temperature=1.5)


def test_words_that_only_the_student_has_get_no_gradient():
    p = problem(5, 40, 37).to(torch.float32)
    (gradient,) = torch.autograd.grad(p.divergence(beta=0.5).sum(), p.head.weight)
    assert torch.equal(gradient[37:], torch.zeros(3, 8)) and gradient[:37].abs().min() > 0


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("rows", [1, 5, 6, 13])
@pytest.mark.parametrize("count", [1, 13])
def test_chunks_change_nothing(count: int, rows: int, beta: float, monkeypatch: pytest.MonkeyPatch):
    rows_per_chunk(monkeypatch, rows)
    agree(problem(count, 40, 37, bias=True), beta=beta, temperature=1.3)


@pytest.mark.parametrize("beta", BETAS)
def test_no_rows_give_no_values(beta: float):
    p = problem(1)
    p.hidden, p.teacher_hidden = p.hidden[:0], p.teacher_hidden[:0]
    p = p.to(torch.float32)
    values = p.divergence(beta=beta)
    assert values.shape == (0,)
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(values.sum(), p.leaves))


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck_in_float64(beta: float):
    p = problem(3, 9, 7, bias=True, student={"softcap": 4.0}).to(torch.float64)

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, p.head.scale, p.head.softcap)
        return token_divergence(hidden, head, p.teacher_hidden, p.teacher_head, beta=beta, temperature=1.7)

    assert torch.autograd.gradcheck(compute, p.leaves)


# --- extremes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_very_large_logits_and_probabilities_that_underflow(size: float, beta: float):
    p = problem(size=size)
    p = p.to(torch.float32)
    found, right = p.divergence(beta=beta), exact(p.to(torch.float64), beta=beta)
    # float32 logits of size 1e4 are known to 1e-3; a bounded divergence is bounded nevertheless.
    assert torch.allclose(found.double(), right, rtol=1e-4, atol=1e-6 * size)
    assert all(g.isfinite().all() for g in gradients(found, p.leaves))
    if 0 < beta < 1:
        assert found.max() <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) + 1e-5


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_sure_of_different_words_is_as_far_as_can_be(beta: float):
    # T all on one word, S all on another: beta ln 1/beta + (1 - beta) ln 1/(1 - beta)
    student, teacher = torch.tensor([[500.0], [0.0]]), torch.tensor([[0.0], [500.0]])
    one = torch.ones(1, 1, requires_grad=True)
    values = token_divergence(one, Head(student), torch.ones(1, 1), Head(teacher), beta=beta)
    assert values.item() == pytest.approx(-beta * math.log(beta) - (1 - beta) * math.log(1 - beta), rel=1e-5)
    values.backward()
    assert one.grad is not None and one.grad.item() == 0


@pytest.mark.parametrize("beta", BETAS)
def test_close_distributions_keep_their_relative_precision(beta: float):
    # For small differences the divergence is quadratic: rounding may not drown it.
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 8, generator=draw, dtype=torch.float64) / 4
    student = teacher + 1e-3 * torch.randn(64, 8, generator=draw, dtype=torch.float64)
    hidden = torch.randn(20, 8, generator=draw, dtype=torch.float64)
    p = Problem(hidden, Head(student), hidden, Head(teacher))
    found = p.to(torch.float32).divergence(beta=beta)
    right = exact(p, beta=beta)
    assert right.max() < 1e-5
    assert (found - right).abs().mean() < (0.01 if 0 < beta < 1 else 0.2) * right.mean()


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_bf16_autocast_is_close_and_returns_float32(beta: float):
    p = problem(64, 200, 200, bias=True, size=0.5)
    ours = p.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours.divergence(beta=beta)
    right = p.to(torch.float64)
    expected = exact(right, beta=beta)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05
    for a, b in zip(gradients(found, ours.leaves), gradients(expected, right.leaves), strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


def test_a_teacher_in_bf16_teaches_a_student_in_float32():
    p = problem(64, 200, 200, size=0.5)
    t = p.teacher_head
    student = p.to(torch.float32)
    found = token_divergence(
        student.hidden, student.head, p.teacher_hidden.bfloat16(), Head(t.weight.bfloat16()), beta=0.5
    )
    assert found.dtype == torch.float32
    assert (found - exact(p, beta=0.5)).abs().max() < 0.02
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients(found, student.leaves))


def test_the_teacher_is_given_no_gradient():
    p = problem()
    teacher_hidden, teacher_weight = p.teacher_hidden.requires_grad_(), p.teacher_head.weight.requires_grad_()
    assert not p.divergence(beta=0.5).requires_grad
    p.hidden.requires_grad_()
    p.divergence(beta=0.5).sum().backward()
    assert teacher_hidden.grad is None and teacher_weight.grad is None and p.hidden.grad is not None


def test_a_second_backward_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch):
    rows_per_chunk(monkeypatch, 5)
    p = problem().to(torch.float32)
    total = p.divergence(beta=0.5).sum()
    first = torch.autograd.grad(total, p.leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(total, p.leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made():
    count, vocabulary, chunk_mb = 300, 50_000, 4
    draw = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(count, 4, generator=draw).requires_grad_() for _ in range(2))
    head, teacher = (Head(torch.randn(vocabulary, 4, generator=draw).requires_grad_()) for _ in range(2))
    with Largest() as largest:
        token_divergence(hidden, head, teacher_hidden, teacher, beta=0.5, chunk_mb=chunk_mb).sum().backward()
    chunk = chunk_mb * 2**20 // 4 // 2  # of the student, and as much of the teacher
    assert chunk / 2 < largest.elements <= chunk < count * vocabulary / 25


# --- another library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.9, 2.0])
def test_trl_gives_the_same_values_and_gradients(temperature: float, beta: float):
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed")
    ours = problem(29, 101, 101, bias=True).to(torch.float32)
    theirs = problem(29, 101, 101, bias=True).to(torch.float32)
    found = ours.divergence(beta=beta, temperature=temperature).sum() / 29
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        logits_of(theirs.hidden, theirs.head)[None],
        logits_of(theirs.teacher_hidden, theirs.teacher_head)[None],
        beta=beta,
        temperature=temperature,
        num_items_in_batch=29,
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    grads = (torch.autograd.grad(total, p.leaves) for total, p in ((found, ours), (expected, theirs)))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


# --- several readers of one head ---------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
def test_logits_are_read_by_several_at_once(options: dict, temperature: float, monkeypatch: pytest.MonkeyPatch):
    """Logprobs and entropy of tokens at temperature 1, and a divergence at another over fewer words."""
    rows_per_chunk(monkeypatch, 5)
    p = problem(13, 40, 37, **options)
    targets = torch.arange(13)

    def total(out: dict[str, Tensor]) -> Tensor:
        return out["logprobs"].double() * 0.3 + out["entropy"].double() * 0.7 - out["divergence"].double()

    ours, right = p.to(torch.float32), p.to(torch.float64)
    readers = (
        Tokens(targets, width=40, extras={"entropy", "correct"}),
        Divergence(ours.teacher_hidden, ours.teacher_head, beta=0.5, width=37, temperature=temperature),
    )
    tokens, from_teacher = read_head(ours.hidden, ours.head, readers)
    out = tokens | from_teacher
    assert set(out) == {"logprobs", "entropy", "correct", "divergence"}
    logp = logits_of(right.hidden, right.head).log_softmax(-1)
    expected = {
        "logprobs": logp.gather(1, targets[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "divergence": exact(right, beta=0.5, temperature=temperature),
    }
    for name, value in expected.items():
        assert_close(out[name].detach(), value.detach())
    assert torch.equal(out["correct"], logp.argmax(-1) == targets)
    for a, b in zip(gradients(total(out), ours.leaves), gradients(total(expected), right.leaves), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["logprobs", "divergence"])
def test_of_several_readers_only_one_may_be_trained_on(name: str, monkeypatch: pytest.MonkeyPatch):
    rows_per_chunk(monkeypatch, 5)
    both, alone = (problem().to(torch.float32) for _ in range(2))
    teacher = Divergence(both.teacher_hidden, both.teacher_head, beta=0.5, width=37)
    tokens, from_teacher = read_head(both.hidden, both.head, [Tokens(torch.arange(13), width=37), teacher])
    found = (tokens | from_teacher)[name]
    if name == "logprobs":
        expected = token_logprobs(alone.hidden, alone.head, torch.arange(13))[name]
    else:
        expected = alone.divergence(beta=0.5)
    assert torch.allclose(found, expected, atol=1e-6)
    for a, b in zip(gradients(found, both.leaves), gradients(expected, alone.leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


# --- chosen words ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [None, 31])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("options", [{}, {"bias": True, "student": {"scale": 2.0, "softcap": 5.0}}], ids=str)
def test_logprobs_of_chosen_words_and_their_gradients(options, temperature, vocabulary, monkeypatch):
    rows_per_chunk(monkeypatch, 5)
    p = problem(13, **options)
    ours, right = p.to(torch.float32), p.to(torch.float64)
    draw = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(31, generator=draw)[:4] for _ in range(13)])
    found = topk_logprobs(ours.hidden, ours.head, ids, temperature=temperature, vocabulary=vocabulary)
    logits = logits_of(right.hidden, right.head, vocabulary) / temperature
    expected = logits.log_softmax(-1).gather(1, ids)
    assert found.shape == (13, 4) and found.dtype == torch.float32
    assert_close(found.detach(), expected.detach())
    for a, b in zip(gradients(found, ours.leaves), gradients(expected, right.leaves), strict=True):
        assert_close(a, b)


def test_chosen_words_beside_the_tokens_logprobs():
    p = problem().to(torch.float32)
    ids = torch.arange(13)[:, None] + torch.arange(3)
    tokens, words = read_head(p.hidden, p.head, [Tokens(torch.arange(13), width=37), Words(ids, width=37)])
    assert torch.allclose(words["topk_logprobs"][:, 0], tokens["logprobs"])


@pytest.mark.parametrize("vocabulary", [None, 31])
@pytest.mark.parametrize("k", [1, 5, 31])
def test_the_likeliest_words_and_their_logprobs(k: int, vocabulary: int | None, monkeypatch: pytest.MonkeyPatch):
    rows_per_chunk(monkeypatch, 5)
    p = problem(bias=True, student={"scale": 0.5})
    ids, logprobs = top_logprobs(p.hidden.requires_grad_(), p.head, k, temperature=0.7, vocabulary=vocabulary)
    assert ids.dtype == torch.int64 and logprobs.dtype == torch.float32 and not logprobs.requires_grad
    right = (logits_of(p.hidden, p.head, vocabulary).double() / 0.7).log_softmax(-1).topk(k)
    assert torch.equal(ids, right.indices)
    assert torch.allclose(logprobs.double(), right.values, atol=1e-5)
