"""Credit within a group: a completion is as good as it is better than its siblings.

Groups are the batch's units, known by id, so a missing member changes nothing but its own group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whet.batch import Batch
from whet.credit.base import credit
from whet.credit.rewards import sequence_rewards, token_penalties
from whet.errors import DataError

EPSILON = 1e-6


@credit(min_group=2)
def grpo(batch: Batch) -> Batch:
    """(r - mean) / (std + 1e-6) in the group, std unbiased. Source: arXiv:2402.03300, section 4.1.

    Exactly 0 in a group whose rewards are all equal, such as one of a single member.
    """
    rewards, groups = sequence_rewards(batch), batch.unit_ids
    size, mean = _size_and_mean(rewards, groups, batch.num_units)
    centred = rewards - mean[groups]
    variance = _sum(centred**2, groups, batch.num_units) / (size - 1).clamp(min=1)
    return _with_advantages(batch, rewards, centred / (variance.sqrt()[groups] + EPSILON))


@credit(min_group=2)
def grpo_no_std(batch: Batch) -> Batch:
    """r - mean of the group. Source: Dr. GRPO, arXiv:2503.20783."""
    rewards = sequence_rewards(batch)
    _, mean = _size_and_mean(rewards, batch.unit_ids, batch.num_units)
    return _with_advantages(batch, rewards, rewards - mean[batch.unit_ids])


@credit(min_group=2)
def rloo(batch: Batch) -> Batch:
    """r - mean of the other members; 0 for a member left alone. Source: arXiv:2402.14740, eq. 7."""
    rewards, groups = sequence_rewards(batch), batch.unit_ids
    size, mean = _size_and_mean(rewards, groups, batch.num_units)
    # r - (n mean - r) / (n - 1) = n / (n - 1) (r - mean)
    factor = torch.where(size > 1, size / (size - 1).clamp(min=1), 0)
    return _with_advantages(batch, rewards, (rewards - mean[groups]) * factor[groups])


@credit(min_group=2)
def maxrl(batch: Batch) -> Batch:
    """(r - mean) / mean of the group: what is rarely right counts more, as in maximum likelihood.

    Exactly 0 in a group without any reward. Raises DataError for a negative reward.
    Source: arXiv:2602.02710.
    """
    rewards = sequence_rewards(batch)
    if bool((batch["rewards"] < 0).any()):
        raise DataError(
            f"credit 'maxrl' divides by the mean reward of a group, but there is a reward of "
            f"{batch['rewards'].min().item():g}; use rewards from 0 on (shaping.clip), or credit grpo"
        )
    _, mean = _size_and_mean(rewards, batch.unit_ids, batch.num_units)
    share = torch.where(mean > 0, 1 / mean.clamp(min=EPSILON), 0.0)[batch.unit_ids]
    return _with_advantages(batch, rewards, (rewards - mean[batch.unit_ids]) * share)


@credit(min_group=2, whitened=True)
def reinforce_plus_plus_baseline(batch: Batch) -> Batch:
    """r - mean of the group, less the KL penalty of each token. Source: REINFORCE++, arXiv:2501.03262."""
    rewards = batch["rewards"]
    _, mean = _size_and_mean(rewards, batch.unit_ids, batch.num_units)
    batch = _with_advantages(batch, rewards, rewards - mean[batch.unit_ids])
    return batch.with_columns(advantages=batch["advantages"] - token_penalties(batch))


@credit(reads=("rewards", "baseline_rewards"))
def remax(batch: Batch) -> Batch:
    """r - reward of the greedy completion of the same prompt. Source: arXiv:2310.10505."""
    advantages = sequence_rewards(batch) - batch["baseline_rewards"][batch.unit_ids]
    return batch.with_columns(advantages=advantages[batch.sequence_ids] * batch.loss_mask)


def _sum(values: Tensor, groups: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, groups, values)


def _size_and_mean(rewards: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    size = _sum(torch.ones_like(rewards), groups, count)
    return size, _sum(rewards, groups, count) / size


def _with_advantages(batch: Batch, rewards: Tensor, advantages: Tensor) -> Batch:
    """[N] -> column `advantages` [T], 0 off the trained tokens and where a group's `rewards` [N] are all equal."""
    groups = batch.unit_ids
    zeros = torch.zeros(batch.num_units, dtype=rewards.dtype, device=rewards.device)
    low, high = (zeros.scatter_reduce(0, groups, rewards, how, include_self=False) for how in ("amin", "amax"))
    advantages = torch.where((low == high)[groups], 0.0, advantages)  # rounding must not make a difference of none
    return batch.with_columns(advantages=advantages[batch.sequence_ids] * batch.loss_mask)
