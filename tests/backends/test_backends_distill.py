"""Distillation through the local backend: the definition's loss and gradient, however a batch is laid out or cut up."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from whet.annotate import Annotate, TeacherTopK
from whet.backends.local import LocalBackend
from whet.batch import Batch, collate
from whet.losses import LOSSES
from whet.losses.distill import Divergence, TopK
from whet.methods import Term
from whet.models.tiny import make_tiny
from whet.types import Sample, Unit

K = 6
OPTIONS = {"beta": 0.3, "temperature": 1.7, "hard": 0.25}
LAYOUTS = ["tree", "packed", "rows"]
EXACT = [Term("gkd", LOSSES["gkd"], "token", options=OPTIONS)]
TOP_K = [Term("gkd_topk", LOSSES["gkd_topk"], "token", options=OPTIONS)]
TERMS = {"exact": EXACT, "top k": TOP_K}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than the student, and with four rows of padding more in its vocabulary."""
    folder = tmp_path_factory.mktemp("teacher") / "llama"
    return make_tiny(folder, family="llama", vocab_size=264, hidden_size=96, num_heads=6, seed=7)


@pytest.fixture
def teacher(teacher_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(teacher_folder)


@pytest.fixture
def pair_of(teacher, backend_of) -> Callable[..., tuple[LocalBackend, LocalBackend]]:
    """Backends of a student and the teacher that it learns from; settings go to both."""

    def make(model, **settings) -> tuple[LocalBackend, LocalBackend]:
        student, frozen = backend_of(model, **settings), backend_of(teacher, **settings)
        student.compute.learn_from(frozen.compute)
        return student, frozen

    return make


def annotated(units: list[Unit], layout: str, teacher: LocalBackend, kind: str) -> Batch:
    batch = collate(units, share_prefixes=layout == "tree").weighed(["token"])
    stage = Annotate("teacher", "hidden", "teacher_hidden") if kind == "exact" else TeacherTopK(K, 1.7)
    return stage(batch, {"teacher": teacher}, {})


def flat_gradient(model) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def merged(logp: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of some words and of all others together."""
    chosen = logp.exp()[ids]
    return torch.cat([chosen, 1 - chosen.sum(0, keepdim=True)]).log()


def defined(student, teacher, units: list[Unit], kind: str) -> tuple[float, Tensor]:
    """Loss and gradient by both models' own forward in float64, row by row and word by word."""
    student, teacher = copy.deepcopy(student).double().eval(), copy.deepcopy(teacher).double().eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in (s for unit in units for s in unit.samples):
        tokens = torch.tensor([sample.tokens])
        logits, wanted = (model(input_ids=tokens, use_cache=False).logits[0] for model in (student, teacher))
        for t in range(1, len(sample.tokens)):
            if not sample.loss_mask[t]:
                continue
            p, q = ((x[t - 1, :260] / OPTIONS["temperature"]).log_softmax(-1) for x in (logits, wanted))
            if kind == "top k":
                ids = q.topk(K).indices
                p, q = merged(p, ids), merged(q, ids)
            beta, hard = OPTIONS["beta"], OPTIONS["hard"]
            mixture = (beta * q.exp() + (1 - beta) * p.exp()).log()
            soft = beta * (q.exp() * (q - mixture)).sum() + (1 - beta) * (p.exp() * (p - mixture)).sum()
            total = total + (1 - hard) * soft - hard * logits[t - 1].log_softmax(-1)[sample.tokens[t]]
            count += 1
    loss = total / count
    loss.backward()
    return loss.item(), flat_gradient(student)


@pytest.mark.parametrize("kind", TERMS)
def test_loss_and_gradient_are_those_of_the_definition(kind: str, model, teacher, units, pair_of):
    student, frozen = pair_of(model, max_tokens_per_device=150)
    metrics = student.forward_backward(annotated(units, "tree", frozen, kind), TERMS[kind])
    loss, gradient = defined(model, teacher, units, kind)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    mixed = (1 - OPTIONS["hard"]) * metrics["divergence"] + OPTIONS["hard"] * metrics["cross_entropy"]
    assert metrics["loss"] == pytest.approx(mixed, rel=1e-5)
    assert_close(flat_gradient(model), gradient)


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 1}, {"max_tokens_per_device": 120}], ids=str)
def test_layout_and_micro_batches_change_nothing(settings, layout, kind, units, pair_of, tiny_qwen):
    results = []
    for attention, given in (("tree", {}), (layout, settings)):
        model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
        student, frozen = pair_of(model, attention=attention, **given)
        metrics = student.forward_backward(annotated(units, attention, frozen, kind), TERMS[kind])
        results.append((metrics, flat_gradient(model)))
    (whole, expected), (cut, found) = results
    assert cut == pytest.approx(whole, rel=1e-5)
    assert_close(found, expected)


def test_units_may_come_in_several_batches(model, units, pair_of):
    """The columns of a batch that was annotated as a whole go with its units."""
    student, frozen = pair_of(model)
    batch = annotated(units, "tree", frozen, "exact")
    whole = student.forward_backward(batch, EXACT)["loss"]
    expected = flat_gradient(model)
    model.zero_grad()
    assert sum(student.forward_backward(part, EXACT)["loss"] for part in batch.split(3)) == pytest.approx(whole)
    assert_close(flat_gradient(model), expected)


def test_all_words_are_the_whole_distribution(model, units, pair_of):
    student, frozen = pair_of(model)
    batch = annotated(units, "tree", frozen, "exact")
    ids = TeacherTopK(1000, 1.7)(batch, {"teacher": frozen}, {})  # more than there are: all that both know
    assert ids["teacher_topk_ids"].shape == (batch.num_tokens, 260)
    losses = [student.forward_backward(ids, terms)["loss"] for terms in (EXACT, TOP_K)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("kind", TERMS)
def test_padding_of_the_students_vocabulary_is_left_out_as_well(kind: str, teacher, units, backend_of, tmp_path):
    """Student and teacher change places: the smaller vocabulary is then the teacher's."""
    padded = teacher
    small = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path / "small"))
    student, frozen = backend_of(padded), backend_of(small)
    student.compute.learn_from(frozen.compute)
    metrics = student.forward_backward(annotated(units, "tree", frozen, kind), TERMS[kind])
    loss, gradient = defined(padded, small, units, kind)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert_close(flat_gradient(padded), gradient)


def test_two_divergences_are_told_apart(model, units, pair_of):
    student, frozen = pair_of(model)
    batch = annotated(units, "tree", frozen, "exact")
    alone = [Term("a", LOSSES["gkd"], "token", 0.5, {"beta": 0.0}), Term("b", LOSSES["gkd"], "token", 2.0)]
    separate = sum(student.forward_backward(batch, [term])["loss"] for term in alone)
    expected = flat_gradient(model)
    model.zero_grad()
    assert student.forward_backward(batch, alone)["loss"] == pytest.approx(separate, rel=1e-6)
    assert_close(flat_gradient(model), expected)


def test_the_teachers_likeliest_words_are_kept_as_whole_numbers(units, pair_of, teacher, model):
    _, frozen = pair_of(model, micro_batch_size=1)
    batch = annotated(units, "tree", frozen, "top k")
    ids, logprobs = batch["teacher_topk_ids"], batch["teacher_topk_logprobs"]
    assert ids.dtype == torch.int64 and ids.shape == logprobs.shape == (batch.num_tokens, K)
    assert (ids[~batch.loss_mask] == 0).all() and (logprobs[~batch.loss_mask] == 0).all()
    start, end = batch.cu_seqlens[:2].tolist()
    logits = teacher(batch.tokens[start:end][None], use_cache=False).logits[0, :-1, :260] / 1.7
    right, mask = logits.log_softmax(-1).topk(K), batch.loss_mask[1:end]
    assert torch.equal(ids[1:end][mask], right.indices[mask])
    assert torch.allclose(logprobs[1:end][mask], right.values[mask], atol=1e-5)


@pytest.mark.parametrize("kind", TERMS)
def test_a_batch_of_which_nothing_is_trained_costs_nothing(kind: str, model, pair_of):
    student, frozen = pair_of(model)
    units = [Unit("masked", (Sample([1, 2, 3], [False] * 3), Sample([4, 5], [False] * 2)))]
    metrics = student.forward_backward(annotated(units, "tree", frozen, kind), TERMS[kind])
    assert metrics["loss"] == 0 and all(p.grad is None for p in model.parameters())


def test_an_oneself_as_teacher_has_nothing_to_teach(model, units, backend_of):
    student = backend_of(model)
    student.compute.learn_from(student.compute)
    out = student.forward(annotated(units, "tree", student, "exact"), {Divergence(0.5, 1.0), "logprobs"})
    assert out[Divergence(0.5, 1.0)].abs().max() < 1e-6 and out["logprobs"].min() < -1


def test_a_teacher_that_is_let_go_of_is_not_kept_by_its_student(units, backend_of, tiny_qwen):
    """Its likeliest words are computed once; its weights need not stay for what follows."""
    student, frozen = (backend_of(AutoModelForCausalLM.from_pretrained(tiny_qwen)) for _ in range(2))
    student.compute.learn_from(frozen.compute)
    batch = annotated(units, "tree", frozen, "top k")
    del frozen
    assert math.isfinite(student.forward_backward(batch, TOP_K)["loss"])
    assert TopK(1.7) in TOP_K[0].outputs
    with pytest.raises(AssertionError, match="no teacher to learn from"):
        student.forward(batch.with_columns(teacher_hidden=torch.zeros(batch.num_tokens, 64)), {Divergence(0.5, 1.0)})
