"""Optimal transport by hand, and the partners from the global batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from whet.batch import collate
from whet.losses.transport import aot, aot_partners, aot_unpaired
from whet.types import Sample, Unit

# Three pairs of one-token completions: L = (-1, -2), (-3, -3), (-1, -4); L_ref = (-2, -2), (-1, -2), (-3, -1).
ROWS = ([-1.0], [-2.0], [-3.0], [-3.0], [-1.0], [-4.0])
REFS = ([-2.0], [-2.0], [-1.0], [-2.0], [-3.0], [-1.0])


def test_partners_by_hand(rows_of):
    out, batch = rows_of(*ROWS, refs=REFS)
    # L_w - L_r = 1, 0, 3 have ranks 1, 0, 2; the reference's 0, 1, -2 sorted are -2, 0, 1.
    # Δ_w = 1, -2, 2 have ranks 1, 0, 2; Δ_r = 0, -1, -3 have ranks 2, 1, 0.
    partners = aot_partners(out["logprobs"], batch)
    assert {name: column.tolist() for name, column in partners.items()} == {
        "aot_reference": [0, -2, 1],
        "aot_rejected": [-1, -3, 0],
        "aot_chosen": [2, 1, -2],
    }
    assert not any(column.requires_grad for column in partners.values())


def test_aot_by_hand(rows_of):
    out, batch = rows_of(*ROWS, refs=REFS, aot_reference=[0.0, -2, 1])
    values, metrics = aot(out, batch, beta=1.0)
    right = -F.logsigmoid(torch.tensor([1.0, 2, 2]))  # 1 - 0, 0 + 2, 3 - 1
    assert torch.allclose(values, right)
    assert metrics["rewards/margins"].tolist() == [1, -1, 5]


def test_aot_unpaired_by_hand_and_its_gradient(rows_of):
    out, batch = rows_of(*ROWS, refs=REFS, aot_rejected=[-1.0, -3, 0], aot_chosen=[2.0, 1, -2])
    values, _ = aot_unpaired(out, batch, beta=1.0)
    assert torch.allclose(values, -F.logsigmoid(torch.tensor([2.0, 1, 2])))  # 1 + 1, -2 + 3, 2 - 0
    (gradient,) = torch.autograd.grad(values.sum(), out["logprobs"])
    # -σ(-x) to the chosen one and σ(-x) to the rejected one that it met: Δ_r = 0 met 2, -1 met 1, -3 met -2
    push = torch.sigmoid(-torch.tensor([2.0, 2, 1, 2, 2, 1]))
    assert torch.allclose(gradient[1::2], push * torch.tensor([-1.0, 1, -1, 1, -1, 1]))


def test_partners_see_the_tokens_as_the_loss_does(rows_of):
    out, batch = rows_of([-1.0], [-1.0, -2.0], refs=([0.0], [0.0, 0.0]))
    assert aot_partners(out["logprobs"], batch, ld_alpha=0.5)["aot_rejected"].tolist() == [-2]
    assert aot_partners(out["logprobs"], batch)["aot_rejected"].tolist() == [-3]


def test_partners_of_bf16_logprobs_are_float32(rows_of):
    out, batch = rows_of(*ROWS, refs=REFS)
    partners = aot_partners(out["logprobs"].bfloat16(), batch)
    assert {column.dtype for column in partners.values()} == {torch.float32}


numbers = st.integers(-6, 6).map(float)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=8), st.sampled_from([0.0, 0.2]))
def test_values_and_gradients_are_those_of_sorting_the_whole_batch(pairs: list, label_smoothing: float):
    # Ties included: equal numbers may be matched in any order, the sum is the same.
    units = [Unit(str(i), (Sample([1, 2], [False, True]), Sample([1, 3], [False, True]))) for i in range(len(pairs))]
    numbers = torch.tensor(pairs)
    ref = F.pad(numbers[:, 2:].reshape(-1, 1), (1, 0)).flatten()
    batch = collate(units).with_columns(ref_logprobs=ref)
    logprobs = F.pad(numbers[:, :2].reshape(-1, 1), (1, 0)).flatten().requires_grad_()
    batch = batch.with_columns(**aot_partners(logprobs, batch))

    exact = numbers[:, :2].clone().requires_grad_()
    chosen, rejected = exact.unbind(1)
    ref_chosen, ref_rejected = numbers[:, 2], numbers[:, 3]
    for function, difference in (
        (aot, (chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values),
        (aot_unpaired, (chosen - ref_chosen).sort().values - (rejected - ref_rejected).sort().values),
    ):
        x = 0.3 * difference
        right = -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)
        values, _ = function({"logprobs": logprobs}, batch, beta=0.3, label_smoothing=label_smoothing)
        assert values.sum().item() == pytest.approx(right.sum().item(), rel=1e-5, abs=1e-6)
        (gradient,) = torch.autograd.grad(values.sum(), logprobs)
        (own,) = torch.autograd.grad(right.sum(), exact, retain_graph=True)
        # Of equal numbers one may get another's share of the gradient: sorted, the shares are the same.
        for ours, theirs in zip(gradient.view(-1, 2, 2)[..., 1].unbind(1), own.unbind(1), strict=True):
            assert torch.allclose(ours.sort().values, theirs.sort().values, rtol=1e-5, atol=1e-6)
