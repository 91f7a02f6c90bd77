"""Credit within a group: a completion is as good as it is better than its siblings.

Groups are the batch's units, known by id, so a missing member changes nothing but its own group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whet.batch import Batch
from whet.credit.base import credit

EPSILON = 1e-6


@credit(min_group=2)
def grpo(batch: Batch) -> Batch:
    """(r - mean) / (std + 1e-6) in the group, std unbiased. Source: arXiv:2402.03300, section 4.1.

    Exactly 0 in a group whose rewards are all equal, such as one of a single member.
    """
    rewards, groups = batch["rewards"], batch.unit_ids
    size, mean = _size_and_mean(rewards, groups, batch.num_units)
    centred = rewards - mean[groups]
    variance = _sum(centred**2, groups, batch.num_units) / (size - 1).clamp(min=1)
    return _with_advantages(batch, centred / (variance.sqrt()[groups] + EPSILON))


@credit(min_group=2)
def grpo_no_std(batch: Batch) -> Batch:
    """r - mean of the group. Source: Dr. GRPO, arXiv:2503.20783."""
    _, mean = _size_and_mean(batch["rewards"], batch.unit_ids, batch.num_units)
    return _with_advantages(batch, batch["rewards"] - mean[batch.unit_ids])


@credit(min_group=2)
def rloo(batch: Batch) -> Batch:
    """r - mean of the other members; 0 for a member left alone. Source: arXiv:2402.14740, eq. 7."""
    rewards, groups = batch["rewards"], batch.unit_ids
    size, mean = _size_and_mean(rewards, groups, batch.num_units)
    # r - (n mean - r) / (n - 1) = n / (n - 1) (r - mean)
    factor = torch.where(size > 1, size / (size - 1).clamp(min=1), 0)
    return _with_advantages(batch, (rewards - mean[groups]) * factor[groups])


def _sum(values: Tensor, groups: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, groups, values)


def _size_and_mean(rewards: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    size = _sum(torch.ones_like(rewards), groups, count)
    return size, _sum(rewards, groups, count) / size


def _with_advantages(batch: Batch, advantages: Tensor) -> Batch:
    """[N] -> column `advantages` [T], 0 off the trained tokens and where a group's rewards are all equal."""
    rewards, groups = batch["rewards"], batch.unit_ids
    zeros = torch.zeros(batch.num_units, dtype=rewards.dtype, device=rewards.device)
    low, high = (zeros.scatter_reduce(0, groups, rewards, how, include_self=False) for how in ("amin", "amax"))
    advantages = torch.where((low == high)[groups], 0.0, advantages)  # rounding must not make a difference of none
    return batch.with_columns(advantages=advantages[batch.sequence_ids] * batch.loss_mask)
