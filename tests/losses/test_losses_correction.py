"""Off-policy correction: worked weights at every level, and what is reported of them."""

from __future__ import annotations

import math

import pytest
import torch

from whet.batch import Batch
from whet.losses.base import Loss, needed
from whet.losses.correction import Corrected, Correction
from whet.losses.policy import ppo_clip, reinforce

OLD = [0.0, -1, -1, -1, 0, -1, -1]
RATIOS = [1.0, 4, 0.25, 1, 1, 3, 3]
"""u of each token; two rows of three and two trained tokens, each behind its prompt."""


@pytest.fixture
def batch(batch_of) -> Batch:
    sampler = [old - math.log(u) for old, u in zip(OLD, RATIOS, strict=True)]
    return batch_of(3, 2, advantages=[0, 1.0, -1, 1, 0, -1, -1], old_logprobs=OLD, sampler_logprobs=sampler)


def outputs(logprobs: list[float] | torch.Tensor) -> dict[str, torch.Tensor]:
    logprobs = torch.as_tensor(logprobs)
    return {"logprobs": logprobs, "entropy": torch.zeros_like(logprobs)}


def weights(correction: Correction, batch: Batch, logprobs: list[float] = OLD) -> tuple[list[float], dict]:
    found, metrics = correction.weights(outputs(logprobs), batch)
    return found[batch.loss_mask].tolist(), {name: value[batch.loss_mask] for name, value in metrics.items()}


# Products: 4 * .25 * 1 = 1, 3 * 3 = 9. Geometric means: 1, 3.
CASES = {
    "tis": (Correction("tis", "token", 0.0, 2.0), [2, 0.25, 1, 2, 2]),
    "tis with a lower limit": (Correction("tis", "token", 0.5, 2.0), [2, 0.5, 1, 2, 2]),
    "tis of sequences": (Correction("tis", "sequence", 0.0, 2.0), [1, 1, 1, 2, 2]),
    "icepop": (Correction("icepop", "token", 0.5, 3.5), [0, 0, 1, 3, 3]),
    "mis of tokens": (Correction("mis", "token", 0.5, 2.0), [0, 0, 1, 0, 0]),
    "mis of sequences": (Correction("mis", "sequence", 0.5, 5.0), [1, 1, 1, 0, 0]),
    "mis of means": (Correction("mis", "geometric", 0.5, 5.0), [1, 1, 1, 3, 3]),
    "a veto": (Correction(None, "token", 0.5, 2.0, veto=0.3), [0, 0, 0, 1, 1]),
    "a veto beside tis": (Correction("tis", "token", 0.0, 2.0, veto=0.3), [0, 0, 0, 2, 2]),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_by_hand(name: str, batch: Batch):
    correction, expected = CASES[name]
    assert weights(correction, batch)[0] == pytest.approx(expected, abs=1e-6)


def test_the_ratio_is_reported_before_it_is_bounded(batch: Batch):
    _, metrics = weights(Correction("tis", "token", 0.0, 2.0, veto=0.3), batch)
    assert metrics["correction_weight"].tolist() == pytest.approx([4, 0.25, 1, 3, 3])
    assert metrics["correction_weight_max"].tolist() == pytest.approx([4, 0.25, 1, 3, 3])
    assert metrics["correction_clipped"].tolist() == [True, False, False, True, True]
    assert metrics["correction_vetoed"].tolist() == [True, True, True, False, False]


def test_opsm_drops_bad_tokens_of_sequences_that_the_policy_has_left(batch: Batch):
    # means of old - new: (.3 + .3 + .3) / 3 = .3; (.1 + .1) / 2 = .1. Only A < 0 in the first row is dropped.
    new = [0.0, -1.3, -1.3, -1.3, 0, -1.1, -1.1]
    found, metrics = weights(Correction(None, "token", 0.5, 2.0, opsm=0.2), batch, new)
    assert found == [1, 0, 1, 1, 1]
    assert metrics["opsm_dropped"].tolist() == [False, True, False, False, False]
    assert weights(Correction(None, "token", 0.5, 2.0, opsm=0.05), batch, new)[0] == [1, 0, 1, 0, 0]
    assert weights(Correction(None, "token", 0.5, 2.0, opsm=0.3001), batch, new)[0] == [1] * 5


@pytest.mark.parametrize("inner", [ppo_clip, reinforce])
def test_values_and_gradients_are_weighed_and_the_weight_has_no_gradient(inner: Loss, batch: Batch):
    corrected = Corrected(inner, Correction("tis", "token", 0.0, 2.0))
    plain, weighed = (torch.tensor(OLD, requires_grad=True) for _ in range(2))
    expected = torch.tensor([1.0, 2, 0.25, 1, 1, 2, 2])
    values, _ = inner(outputs(plain), batch)
    found, metrics = corrected(outputs(weighed), batch)
    assert torch.allclose(found, values * expected)
    values.backward(expected)
    found.sum().backward()
    assert torch.allclose(weighed.grad, plain.grad)
    assert {"ppo_kl", "entropy", "correction_weight"} <= metrics.keys()


def test_a_corrected_loss_needs_what_it_needs_and_the_sampler(batch: Batch):
    corrected = Corrected(ppo_clip, Correction("icepop", "token", 0.5, 5.0))
    assert isinstance(corrected, Loss)
    assert corrected.reads == {"advantages", "sampler_logprobs"}
    assert needed(corrected, {}) == needed(ppo_clip, {})
    assert Corrected(reinforce, Correction(None, "token", 0.5, 2.0, opsm=0.1)).reads == {"advantages"}


def test_without_old_logprobs_the_trainer_of_this_moment_is_held_against_the_sampler(batch_of):
    batch = batch_of(1, advantages=[0.0, 1], sampler_logprobs=[0, -1.0 - math.log(3)])
    found, _ = Correction("tis", "token", 0.0, 2.0).weights(outputs([0, -1.0]), batch)
    assert found[1].item() == 2
