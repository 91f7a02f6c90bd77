"""The chunked head: values and gradients against a float64 log_softmax, and no [T, V] tensor anywhere."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from heads import Head, Largest, rows_per_chunk
from torch import Tensor

from whet.tensor import logits
from whet.tensor.logprobs import token_logprobs

EXTRAS = frozenset({"entropy", "mean_logprobs", "correct", "log_sum_sq_probs"})
CONSTANTS = {"correct", "log_sum_sq_probs"}


def problem(count: int = 13, vocabulary: int = 37, width: int = 8, *, bias: bool = False, size: float = 1.0, **options):
    """Hidden states, head and targets drawn from a fixed seed."""
    draw = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, width, generator=draw) * size
    weight = torch.randn(vocabulary, width, generator=draw)
    drawn_bias = torch.randn(vocabulary, generator=draw) if bias else None
    targets = torch.randint(vocabulary, (count,), generator=draw)
    return hidden, Head(weight, drawn_bias, **options), targets


def exact(hidden: Tensor, head: Head, targets: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """The definition."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logp = (logits / temperature).log_softmax(-1)
    return {
        "logprobs": logp.gather(1, targets[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "mean_logprobs": logp.mean(-1),
        "correct": logp.argmax(-1) == targets,
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
    }


def leaves(hidden: Tensor, head: Head, dtype: torch.dtype) -> tuple[Tensor, Head, list[Tensor]]:
    tensors = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, head.weight, head.bias) if x is not None]
    return tensors[0], Head(tensors[1], tensors[2] if len(tensors) > 2 else None, head.scale, head.softcap), tensors


def value_and_gradients(compute, hidden, head, targets, names, dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs, and the gradients of a weighted sum of those in `names`."""
    hidden, head, tensors = leaves(hidden, head, dtype)
    values = compute(hidden, head, targets)
    draw = torch.Generator().manual_seed(1)
    total = sum((values[n].double() * torch.randn(len(targets), generator=draw)).sum() for n in names)
    total.backward()
    return {name: v.detach() for name, v in values.items()}, [x.grad.double() for x in tensors]


def agree(hidden, head, targets, *, names=("logprobs", "entropy", "mean_logprobs"), tolerance=1e-5, **options) -> None:
    extras = EXTRAS & {*names, *CONSTANTS}
    temperature = options.get("temperature", 1.0)
    found, grads = value_and_gradients(
        lambda *x: token_logprobs(*x, extras=extras, **options), hidden, head, targets, names, torch.float32
    )
    right, right_grads = value_and_gradients(
        lambda *x: exact(*x, temperature=temperature), hidden, head, targets, names, torch.float64
    )
    assert set(found) == {"logprobs", *extras}
    for name in found:
        assert found[name].dtype == (torch.bool if name == "correct" else torch.float32)
        assert torch.allclose(found[name].double(), right[name].double(), rtol=tolerance, atol=tolerance), name
    for ours, theirs in zip(grads, right_grads, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "tight softcap": {"softcap": 1.5},
    "bias, scale and softcap": {"bias": True, "scale": 2.0, "softcap": 5.0},
}


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
def test_values_and_gradients_of_every_output(options: dict, temperature: float):
    agree(*problem(**options), temperature=temperature)


@pytest.mark.parametrize("names", [["logprobs"], ["entropy"], ["mean_logprobs"], ["logprobs", "entropy"]])
def test_gradients_of_each_output_alone(names: list[str], monkeypatch: pytest.MonkeyPatch):
    rows_per_chunk(monkeypatch, 5)
    agree(*problem(softcap=4.0), names=tuple(names), temperature=0.8)


@pytest.mark.parametrize("rows", [1, 4, 6, 12, 13, 100])  # of 12: single rows, exact multiples, one chunk
@pytest.mark.parametrize("count", [1, 12, 13])
def test_chunks_change_nothing(rows: int, count: int, monkeypatch: pytest.MonkeyPatch):
    rows_per_chunk(monkeypatch, rows)
    agree(*problem(count, bias=True, softcap=6.0))


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_very_large_logits_stay_finite_and_right(size: float):
    # Logits around 1e4 leave float32 about 1e-3 of absolute precision; nothing may overflow or turn to NaN.
    hidden, head, targets = problem(size=size)
    out = token_logprobs(hidden.requires_grad_(), head, targets, extras=EXTRAS)
    right = exact(hidden.double(), Head(head.weight.double()), targets)
    for name in ("logprobs", "entropy", "mean_logprobs", "log_sum_sq_probs"):
        assert torch.allclose(out[name].double(), right[name], rtol=1e-6, atol=2e-7 * size), name
    (out["logprobs"].sum() + out["entropy"].sum()).backward()
    assert hidden.grad.isfinite().all()


def test_a_frozen_head_gets_no_gradient_and_passes_the_same_on():
    hidden, head, targets = problem(bias=True)
    both, frozen = (hidden.clone().requires_grad_() for _ in range(2))
    trained = Head(head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_())
    token_logprobs(both, trained, targets)["logprobs"].sum().backward()
    token_logprobs(frozen, head, targets)["logprobs"].sum().backward()
    assert torch.equal(both.grad, frozen.grad)
    assert head.weight.grad is None and head.bias.grad is None and trained.weight.grad is not None


def test_nothing_is_kept_when_nothing_needs_a_gradient():
    hidden, head, targets = problem()
    out = token_logprobs(hidden, head, targets, extras=EXTRAS)
    assert not any(value.requires_grad for value in out.values())
    out = token_logprobs(hidden.requires_grad_(), head, targets, extras=EXTRAS)
    assert {name for name, value in out.items() if not value.requires_grad} == CONSTANTS


def test_a_second_backward_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch):
    rows_per_chunk(monkeypatch, 5)
    hidden, head, targets = problem()
    hidden.requires_grad_()
    total = token_logprobs(hidden, head, targets)["logprobs"].sum()
    (first,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(total, hidden)
    assert torch.allclose(first, second, atol=1e-6)


def test_what_a_step_held_is_freed_at_once():
    hidden, head, targets = problem()
    gc.disable()
    try:
        out = token_logprobs(hidden.requires_grad_(), head, targets, extras=EXTRAS)
        held = [weakref.ref(value) for value in (*out.values(), out["logprobs"].grad_fn)]
        (out["logprobs"] + out["entropy"]).sum().backward()
        del out
        assert [one() for one in held] == [None] * len(held)
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 6.0}], ids=["plain", "bias and softcap"])
def test_bf16_autocast_is_close_and_returns_float32(options: dict):
    hidden, head, targets = problem(64, 200, 32, **options)

    def compute(*x):
        with torch.autocast("cpu", torch.bfloat16):
            return token_logprobs(*x, extras=EXTRAS)

    names = ("logprobs", "entropy")
    found, grads = value_and_gradients(compute, hidden, head, targets, names, torch.float32)
    right, right_grads = value_and_gradients(exact, hidden, head, targets, names, torch.float64)
    for name in names:
        assert found[name].dtype == torch.float32
        assert (found[name] - right[name]).abs().max() < 0.1
    for ours, theirs in zip(grads, right_grads, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_bf16_weights_get_bf16_gradients():
    hidden, head, targets = problem(64, 200, 32)
    found, grads = value_and_gradients(token_logprobs, hidden, head, targets, ("logprobs",), torch.bfloat16)
    _, right = value_and_gradients(exact, hidden.bfloat16(), head, targets, ("logprobs",), torch.float64)
    assert found["logprobs"].dtype == torch.float32
    for ours, theirs in zip(grads, right, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_one_of_several_likeliest_tokens_is_the_likeliest():
    hidden, head, _ = problem(5)
    out = token_logprobs(hidden * 0, head, torch.arange(5), extras={"correct"})
    assert out["correct"].tolist() == [True, False, False, False, False]


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made():
    count, vocabulary, chunk_mb = 2000, 50_000, 8
    hidden, head, targets = problem(count, vocabulary, 4)
    hidden.requires_grad_(), head.weight.requires_grad_()
    with Largest() as largest:
        token_logprobs(hidden, head, targets, extras={"entropy"}, chunk_mb=chunk_mb)["logprobs"].sum().backward()
    chunk = chunk_mb * 2**20 // 4
    assert largest.elements <= chunk < count * vocabulary / 40
    assert largest.elements > chunk / 2, "the logits were seen"


def test_the_largest_tensor_is_noticed():
    with Largest() as largest:
        torch.ones(30, 7)
    assert largest.elements == 210


@pytest.mark.parametrize(
    ("count", "most", "lengths"), [(10, 4, [3, 3, 4]), (8, 4, [4, 4]), (3, 4, [3]), (9, 1, [1] * 9)]
)
def test_chunks_are_few_and_as_long_as_each_other(count: int, most: int, lengths: list[int]):
    spans = logits.even_spans(count, most)
    assert [span.stop - span.start for span in spans] == lengths
    assert [i for span in spans for i in range(count)[span]] == list(range(count))
