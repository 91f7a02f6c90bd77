"""Credit from token to token: discounted returns, and advantages over a critic's values.

Tokens that are not trained, such as a tool's output, are skipped: the step before one leads to the next trained token.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from whet.batch import Batch
from whet.credit.base import credit
from whet.credit.rewards import token_rewards

Share = Annotated[float, Field(ge=0, le=1)]


@credit(whitened=True)
def reinforce_plus_plus(batch: Batch, *, gamma: Share = 1.0) -> Batch:
    """The discounted return of each token [T]. Source: REINFORCE++, arXiv:2501.03262, section 3."""
    rows = _Rows(batch)
    return batch.with_columns(advantages=rows.flat(discounted(rows.padded(token_rewards(batch)), gamma)))


@credit(reads=("rewards", "values"), writes=("advantages", "returns"), whitened=True)
def gae(batch: Batch, *, gamma: Share = 1.0, lam: Share = 0.95) -> Batch:
    """Generalised advantage estimation: discounted sums of r + γ v(next) - v; `returns` are advantages + values [T].

    Source: Schulman et al. 2015 (arXiv:1506.02438), eq. 16.
    """
    rows = _Rows(batch)
    values = rows.padded(batch["values"])
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))  # 0 after the end
    advantages = discounted(rows.padded(token_rewards(batch)) + gamma * following - values, gamma * lam)
    return batch.with_columns(advantages=rows.flat(advantages), returns=rows.flat(advantages + values))


def discounted(steps: Tensor, factor: float) -> Tensor:
    """[N, L] -> [N, L] sums of what comes from each place on, each further step times `factor`."""
    sums, following = torch.empty_like(steps), torch.zeros_like(steps[:, 0])
    for place in reversed(range(steps.shape[1])):
        following = steps[:, place] + factor * following
        sums[:, place] = following
    return sums


class _Rows:
    """The trained tokens of a batch side by side: [T] <-> [N, L] with L the most of a sequence, 0 behind the others."""

    def __init__(self, batch: Batch) -> None:
        self.tokens = batch.loss_mask.nonzero()[:, 0]
        self.rows = batch.sequence_ids[self.tokens]
        before = torch.nn.functional.pad(batch.num_trained.cumsum(0), (1, 0))[:-1]
        self.places = torch.arange(len(self.tokens), device=self.tokens.device) - before[self.rows]
        # At least one place, so that a batch in which nothing is trained has a shape.
        self.shape = batch.num_sequences, max(1, int(batch.num_trained.max()))
        self.num_tokens = batch.num_tokens

    def padded(self, values: Tensor) -> Tensor:
        """[T] -> [N, L]."""
        grid = values.new_zeros(self.shape)
        grid[self.rows, self.places] = values[self.tokens]
        return grid

    def flat(self, grid: Tensor) -> Tensor:
        """[N, L] -> [T], 0 where no token is trained."""
        return grid.new_zeros(self.num_tokens).index_copy(0, self.tokens, grid[self.rows, self.places])
