"""What credit rules make of rewards and KL penalties: one number per sequence, or one per token."""

from __future__ import annotations

import torch
from torch import Tensor

from whet.batch import Batch


def sequence_rewards(batch: Batch) -> Tensor:
    """[N] the reward of each sequence, less the KL penalties of its trained tokens where there are any."""
    if "kl_penalties" not in batch:
        return batch["rewards"]
    return batch["rewards"] - batch.sum_tokens(batch["kl_penalties"])


def token_penalties(batch: Batch) -> Tensor:
    """[T] the KL penalty of each trained token; 0 elsewhere."""
    if "kl_penalties" not in batch:
        return torch.zeros(batch.num_tokens, device=batch.tokens.device)
    return torch.where(batch.loss_mask, batch["kl_penalties"], 0.0)


def token_rewards(batch: Batch) -> Tensor:
    """[T] the reward at the last trained token of each sequence, less the KL penalty of every trained token."""
    rewards = -token_penalties(batch)
    trained = batch.loss_mask.nonzero()[:, 0]
    last = torch.full((batch.num_sequences,), -1, device=trained.device)
    last = last.scatter_reduce(0, batch.sequence_ids[trained], trained, "amax")
    has = last >= 0
    return rewards.index_add(0, last[has], batch["rewards"][has].to(rewards.dtype))
