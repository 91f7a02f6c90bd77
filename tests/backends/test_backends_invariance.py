"""Loss and gradient do not depend on how a batch is laid out or cut up, and are those of the definition.

The definition is the model's own forward in float64, row by row, and the losses written out by hand.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from whet.batch import Batch, collate
from whet.credit import CREDITS
from whet.losses import LOSSES
from whet.methods import Term
from whet.types import Sample, Unit

LAYOUTS = ["tree", "packed", "rows"]
SFT = [Term("sft", LOSSES["sft"], "token", options={"label_smoothing": 0.1})]
GRPO = [
    Term("ppo_clip", LOSSES["ppo_clip"], "sequence"),
    Term("kl", LOSSES["kl"], "sequence", coef=0.3),
    Term("entropy_bonus", LOSSES["entropy_bonus"], "token", coef=0.05),
]


def flat_gradient(model) -> Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.flatten() for part in parts]).double()


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """The difference of two gradients is small against their size."""
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def collated(units: list[Unit], layout: str) -> Batch:
    return collate(units, share_prefixes=layout == "tree")


def columns_for_grpo(batch: Batch) -> Batch:
    """Advantages by group, the sampler's logprobs as the old ones, and a made-up reference."""
    reference = torch.where(batch.loss_mask, batch["sampler_logprobs"] * 0.9 - 0.1, 0)
    batch = CREDITS["grpo"](batch)
    # Near the model's own logprobs (about -log 260), so that the ratio is sometimes clipped and sometimes not.
    old = torch.where(batch.loss_mask, batch["sampler_logprobs"] * 0.3 - 5.2, 0)
    return batch.with_columns(old_logprobs=old, ref_logprobs=reference - 4.5 * batch.loss_mask)


def sft_batch(units: list[Unit], layout: str = "tree") -> Batch:
    return collated(units, layout).weighed(["token"])


def grpo_batch(units: list[Unit], layout: str = "tree") -> Batch:
    return columns_for_grpo(collated(units, layout)).weighed(["token", "sequence"])


METHODS = {"sft": (sft_batch, SFT), "grpo": (grpo_batch, GRPO)}
method = pytest.mark.parametrize("method", METHODS)


# --- the definition ---------------------------------------------------------------------------------


def own_distribution(model, sample: Sample) -> Tensor:
    """Log-probabilities [length, V] of every token given those before it; row 0 is unused."""
    logits = model(input_ids=torch.tensor([sample.tokens]), use_cache=False).logits[0]
    return torch.cat([logits[:1], logits[:-1]]).log_softmax(-1)


def trained_places(sample: Sample) -> list[int]:
    return [t for t in range(1, len(sample.tokens)) if sample.loss_mask[t]]


def defined_sft(model, units: list[Unit]) -> Tensor:
    total, count = 0.0, 0
    for sample in (s for unit in units for s in unit.samples):
        logp = own_distribution(model, sample)
        for t in trained_places(sample):
            total = total - 0.9 * logp[t, sample.tokens[t]] - 0.1 * logp[t].mean()
            count += 1
    return total / count


def defined_grpo(model, units: list[Unit]) -> Tensor:
    total = 0.0
    samples = [s for unit in units for s in unit.samples]
    num_sequences = sum(bool(trained_places(s)) for s in samples)
    num_tokens = sum(len(trained_places(s)) for s in samples)
    for unit in units:
        rewards = [s.reward for s in unit.samples]
        mean = sum(rewards) / len(rewards)
        variance = sum((r - mean) ** 2 for r in rewards) / max(1, len(rewards) - 1)
        for sample in unit.samples:
            advantage = (sample.reward - mean) / (math.sqrt(variance) + 1e-6)
            places = trained_places(sample)
            if not places:
                continue
            logp = own_distribution(model, sample)
            for t in places:
                x, sampler = logp[t, sample.tokens[t]], sample.sampler_logprobs[t]
                ratio = (x - (sampler * 0.3 - 5.2)).exp()
                clipped = ratio.clamp(0.8, 1.28)
                policy = torch.maximum(-ratio * advantage, -clipped * advantage)
                d = x - (sampler * 0.9 - 4.6)
                entropy = -(logp[t].exp() * logp[t]).sum()
                total = total + (policy + 0.3 * ((-d).exp() - 1 + d)) / len(places) / num_sequences
                total = total - 0.05 * entropy / num_tokens
    return total


DEFINITIONS: dict[str, Callable] = {"sft": defined_sft, "grpo": defined_grpo}


def defined(model, units: list[Unit], method: str) -> tuple[float, Tensor]:
    exact = copy.deepcopy(model).double().eval()
    loss = DEFINITIONS[method](exact, units)
    loss.backward()
    return loss.item(), flat_gradient(exact)


# --- claims ------------------------------------------------------------------------------------------


@pytest.fixture
def measured(model, backend_of):
    """Loss and gradient of a list of batches, one forward_backward each, by settings of the backend."""

    def measure(batches: list[Batch], terms, *, layout="tree", **settings) -> tuple[float, Tensor]:
        backend = backend_of(model, attention=layout, **settings)
        model.zero_grad(set_to_none=True)
        loss = sum(backend.forward_backward(batch, terms)["loss"] for batch in batches)
        return loss, flat_gradient(model)

    return measure


def test_the_units_are_as_awkward_as_they_claim(units):
    batch = collate(units)
    depth = max(len(batch.tree.ancestors(s)) for s in range(len(batch.tree.parents))) + 1
    assert depth >= 4
    assert (batch.num_trained == 0).sum() >= 4, "rows of which nothing is trained"
    trained = batch.tree.index[batch.loss_mask.numpy()]
    assert len(set(trained.tolist())) < len(trained), "tokens trained in several rows"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_are_those_of_the_models_own_forward(layout: str, model, units, backend_of):
    batch = collated(units, layout)
    found = backend_of(model, attention=layout, max_tokens_per_device=150).forward(batch, {"logprobs", "entropy"})
    exact = copy.deepcopy(model).double().eval()
    offset = 0
    for sample in (s for unit in units for s in unit.samples):
        with torch.no_grad():
            logp = own_distribution(exact, sample)
        for t in range(len(sample.tokens)):
            logprob, entropy = (found[name][offset + t].item() for name in ("logprobs", "entropy"))
            if t in trained_places(sample):
                assert logprob == pytest.approx(logp[t, sample.tokens[t]].item(), abs=1e-5)
                assert entropy == pytest.approx(-(logp[t].exp() * logp[t]).sum().item(), abs=1e-5)
            else:
                assert logprob == entropy == 0
        offset += len(sample.tokens)


@method
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_those_of_the_definition(layout: str, method: str, model, units, measured):
    make, terms = METHODS[method]
    loss, gradient = measured([make(units, layout)], terms, layout=layout)
    right_loss, right_gradient = defined(model, units, method)
    assert loss == pytest.approx(right_loss, rel=1e-5)
    assert_close(gradient, right_gradient)


@method
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_does_not_depend_on_micro_batches(layout: str, method: str, units, measured):
    make, terms = METHODS[method]
    batch = make(units, layout)
    loss, gradient = measured([batch], terms, layout=layout)  # 8 x 1: all units in one
    # With 1, every row of a group is a micro-batch of its own.
    limits = ({"micro_batch_size": 1}, {"micro_batch_size": 3}, *({"max_tokens_per_device": n} for n in (120, 30, 1)))
    for settings in limits:
        other_loss, other = measured([batch], terms, layout=layout, **settings)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert_close(other, gradient)


@method
def test_tree_and_packing_and_padding_agree(method: str, units, measured):
    make, terms = METHODS[method]
    results = {layout: measured([make(units, layout)], terms, layout=layout) for layout in LAYOUTS}
    for layout in ("packed", "rows"):
        assert results[layout][0] == pytest.approx(results["tree"][0], rel=1e-5)
        assert_close(results[layout][1], results["tree"][1])


@method
def test_the_order_of_units_does_not_matter(method: str, units, measured):
    make, terms = METHODS[method]
    loss, gradient = measured([make(units)], terms)
    other_loss, other = measured([make(units[::-1])], terms)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert_close(other, gradient)


@method
def test_a_partial_last_window_is_weighed_by_what_is_in_it(method: str, model, units, measured):
    # Eight units by three to an optimizer step leave two for the last; each step is the mean over its own.
    make, terms = METHODS[method]
    for window in (units[0:3], units[3:6], units[6:8]):
        right_loss, right_gradient = defined(model, window, method)
        loss, gradient = measured([make(window)], terms, micro_batch_size=1)
        assert loss == pytest.approx(right_loss, rel=1e-5, abs=1e-7)
        if right_gradient.norm() > 0:
            assert_close(gradient, right_gradient)


def test_a_batch_given_in_parts_adds_up(units, measured):
    # What several ranks would do: the weights are of the whole, each takes a part, and the parts are added.
    batch = grpo_batch(units)
    loss, gradient = measured([batch], GRPO)
    other_loss, other = measured([batch.select([0, 5, 2]), batch.select([1, 3]), batch.select([4, 6, 7])], GRPO)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert_close(other, gradient)


@method
def test_rows_without_trained_tokens_change_nothing(method: str, units, measured):
    make, terms = METHODS[method]
    masked = Unit("masked", (Sample([1, 2, 3], [False] * 3, [0.0] * 3, 1.0), Sample([4], [True], [0.0], 0.0)))
    loss, gradient = measured([make(units)], terms)
    for settings in ({}, {"micro_batch_size": 1}):
        other_loss, other = measured([make([masked, *units, masked])], terms, **settings)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert_close(other, gradient)


def test_a_missing_member_moves_no_advantage_of_another_group(model, units, measured):
    group = units[1]
    short = [*units[:1], Unit(group.id, group.samples[1:]), *units[2:]]
    loss, gradient = measured([grpo_batch(short)], GRPO, micro_batch_size=1)
    right_loss, right_gradient = defined(model, short, "grpo")
    assert loss == pytest.approx(right_loss, rel=1e-5)
    assert_close(gradient, right_gradient)


def test_some_ratios_are_clipped_and_some_are_not(model, units, backend_of):
    metrics = backend_of(model).forward_backward(grpo_batch(units), GRPO)
    assert metrics["clip_fraction_low"] > 0.01 and metrics["clip_fraction_high"] > 0.01
    assert metrics["clip_fraction_low"] + metrics["clip_fraction_high"] < 0.5


@method
def test_activation_checkpointing_runs_layers_twice_and_changes_nothing(
    method: str, model, units, backend_of, monkeypatch
):
    make, terms = METHODS[method]
    mlp, calls = type(model.model.layers[0].mlp), []
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda *a, **k: (calls.append(a[0]), forward(*a, **k))[1])
    results = []
    for settings, times in (({}, 1), ({"activation_checkpointing": True}, 2)):
        backend = backend_of(model, **settings)
        calls.clear()
        loss = backend.forward_backward(make(units), terms)["loss"]
        assert len(calls) == times * len(model.model.layers)
        results.append((loss, flat_gradient(model)))
        model.zero_grad(set_to_none=True)
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    assert_close(results[1][1], results[0][1], 1e-6)


def test_temperature_divides_the_logits(model, units, backend_of):
    batch = collate(units)
    found = backend_of(model, temperature=0.7).forward(batch, {"logprobs"})["logprobs"]
    sample = units[3].samples[0]
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(input_ids=torch.tensor([sample.tokens])).logits[0]
    start = sum(len(s.tokens) for unit in units[:3] for s in unit.samples)
    for t in trained_places(sample):
        right = (logits[t - 1] / 0.7).log_softmax(-1)[sample.tokens[t]].item()
        assert found[start + t].item() == pytest.approx(right, abs=1e-5)
