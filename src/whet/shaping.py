"""Shaping: what is done to the rewards of a global batch before credit is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whet.annotate import Model, Running
from whet.batch import Batch
from whet.errors import DataError

Transform = Callable[[Tensor, Batch], Tensor]
"""From the rewards [N] and the batch they belong to, to other rewards [N]."""


@dataclass(frozen=True)
class Shaping:
    """Replaces `rewards`: the user's transform, then scale, then clip, then the punishment of long completions.

    Over the last `buffer` tokens before `longest` the reward falls linearly by `overlong_coef`, counted in the tokens
    that the policy sampled. With `mask_truncated` sequences that were cut off are not trained; their rewards stay.
    Source: soft overlong punishment and overlong filtering, DAPO, arXiv:2503.14476, eq. 13.
    """

    longest: int
    transform: Transform | None = None
    scale: float = 1.0
    clip: float | None = None
    buffer: int | None = None
    overlong_coef: float = 1.0
    mask_truncated: bool = False
    roles: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()

    def __call__(self, batch: Batch, models: Mapping[str, Model], running: Running) -> Batch:
        rewards = batch["rewards"]
        if self.transform is not None:
            rewards = self._transformed(rewards, batch)
        rewards = rewards * self.scale
        if self.clip is not None:
            rewards = rewards.clamp(-self.clip, self.clip)
        if self.buffer is not None:
            rewards = rewards - self.overlong_coef * overlong(batch.num_trained, self.longest, self.buffer)
        batch = batch.with_columns(rewards=rewards)
        if self.mask_truncated:
            kept = batch["truncated"] == 0
            batch = replace(batch, loss_mask=batch.loss_mask & kept[batch.sequence_ids])
        return batch

    def _transformed(self, rewards: Tensor, batch: Batch) -> Tensor:
        assert self.transform is not None, "there is a transform"
        name = getattr(self.transform, "__name__", "the function")
        found = torch.as_tensor(self.transform(rewards, batch), dtype=rewards.dtype, device=rewards.device)
        if found.shape != rewards.shape:
            raise DataError(
                f"shaping.transform: {name} gave {list(found.shape)} for {len(rewards)} rewards; return one number each"
            )
        if not torch.isfinite(found).all():
            raise DataError(f"shaping.transform: {name} gave a reward that is not finite: {found.tolist()}")
        return found


def overlong(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """How far into the buffer before `longest` each length reaches: 0 before it, 1 at its end."""
    return ((lengths - (longest - buffer)) / buffer).clamp(0, 1)
