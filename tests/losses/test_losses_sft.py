"""Supervised losses by hand, and against formulas of their own in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from whet.losses.sft import dft, sft

EXTRA = {"correct": torch.ones(3), "entropy": torch.ones(3)}


def test_sft_is_minus_the_logprob(batch_of):
    values, metrics = sft({"logprobs": torch.tensor([0, -0.5, -2.0]), **EXTRA}, batch_of(2))
    assert values.tolist() == [0, 0.5, 2]
    assert set(metrics) == {"mean_token_accuracy", "entropy"}


def test_label_smoothing_spreads_a_share_over_the_vocabulary(batch_of):
    # .9 * .5 + .1 * 3 = .75; .9 * 2 + .1 * 4 = 2.2
    out = {"logprobs": torch.tensor([0, -0.5, -2.0]), "mean_logprobs": torch.tensor([0, -3.0, -4.0]), **EXTRA}
    assert sft(out, batch_of(2), label_smoothing=0.1)[0].tolist() == pytest.approx([0, 0.75, 2.2])


def test_label_smoothing_is_that_of_cross_entropy(batch_of):
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logp, targets = logits.log_softmax(-1), torch.tensor([4, 0, 10])
    out = {"logprobs": logp.gather(1, targets[:, None])[:, 0], "mean_logprobs": logp.mean(-1), **EXTRA}
    right = F.cross_entropy(logits, targets, label_smoothing=0.3, reduction="none")
    assert torch.allclose(sft(out, batch_of(2), label_smoothing=0.3)[0], right)


def test_dft_weighs_each_token_by_its_probability_and_does_not_learn_the_weight(batch_of):
    logprobs = torch.tensor([0, math.log(0.5), math.log(0.1)], requires_grad=True)
    values, _ = dft({"logprobs": logprobs, **EXTRA}, batch_of(2))
    assert values.tolist() == pytest.approx([0, 0.5 * math.log(2), 0.1 * math.log(10)])
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([-1, -0.5, -0.1])  # -p, not -p (1 + log p)
