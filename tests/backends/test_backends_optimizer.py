"""The learning rate over time by hand, and what is decayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from whet.backends.optimizer import adamw, learning_rate
from whet.config.optim import OptimConfig


def rates(total: int, **settings) -> list[float]:
    config = OptimConfig(lr=1.0, **settings)
    return [round(learning_rate(config, step, total), 6) for step in range(total)]


def test_linear_falls_in_equal_steps_and_the_last_step_still_learns():
    assert rates(4, schedule="linear") == [1, 0.75, 0.5, 0.25]


def test_warm_up_rises_to_the_full_rate_and_the_schedule_begins_after_it():
    # two steps of warm-up: 1/2, 2/2; then 4 steps down from 1
    assert rates(6, schedule="linear", warmup_steps=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_cosine_by_hand():
    # (1 + cos(pi k / 4)) / 2
    assert rates(4, schedule="cosine") == [1, 0.853553, 0.5, 0.146447]


def test_constant_stays():
    assert rates(3, schedule="constant", warmup_steps=1) == [1, 1, 1]


def test_the_least_rate_is_what_the_schedule_ends_at():
    # .1 + .9 * (1, .5)
    assert rates(2, schedule="linear", min_lr_ratio=0.1) == [1, 0.55]


@pytest.mark.parametrize(("ratio", "total", "warmup"), [(0.1, 10, 1), (0.1, 11, 2), (0.0, 10, 0), (0.5, 3, 2)])
def test_a_share_of_warm_up_is_rounded_up(ratio: float, total: int, warmup: int):
    found = rates(total, schedule="constant", warmup_ratio=ratio)
    assert sum(rate < 1 for rate in found) == max(0, warmup - 1)
    assert found == rates(total, schedule="constant", warmup_steps=warmup)


def test_steps_of_warm_up_take_precedence_over_a_share():
    assert rates(4, schedule="constant", warmup_steps=0, warmup_ratio=0.5) == [1] * 4


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_longer_than_the_run_and_steps_past_its_end_are_harmless(schedule):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=10)
    assert [learning_rate(config, step, 4) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    config = OptimConfig(lr=1.0, schedule=schedule, min_lr_ratio=0.1)
    assert learning_rate(config, 7, 4) == (1.0 if schedule == "constant" else pytest.approx(0.1))


def test_matrices_are_decayed_and_vectors_are_not():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    model[2].requires_grad_(False)
    optimizer = adamw(model, OptimConfig(lr=0.5, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-6))
    decayed, plain = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [torch.Size([4, 3])]
    assert [p.shape for p in plain["params"]] == [torch.Size([4])] * 3
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    assert {(g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups} == {(0.5, (0.8, 0.9), 1e-6)}
