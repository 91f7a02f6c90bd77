"""A mixture: rows learned as in supervised fine-tuning, in the optimizer steps of reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whet.batch import Batch, collate
from whet.config.algorithm import MixConfig
from whet.data.source import RowSource
from whet.losses import LOSSES
from whet.losses.base import defaults
from whet.methods import Term
from whet.tally import weight_keys


class Mix:
    """Gives out batches of rows with weights of their own, one per optimizer step, for `term`."""

    def __init__(self, rows: RowSource, config: MixConfig) -> None:
        self.rows, self.config = rows, config
        self.term = Term("sft", LOSSES["sft"], "token", config.coef, defaults(LOSSES["sft"]))

    async def take(self, count: int, *, share_prefixes: bool) -> list[Batch]:
        """The batches of the next `count` optimizer steps; the last of an epoch may be short."""
        taken = [await self.rows.take(self.config.batch_size) for _ in range(count)]
        return [collate(units, share_prefixes=share_prefixes).weighed(weight_keys([self.term])) for units in taken]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands in the rows."""
        return self.rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises CheckpointError for other rows."""
        self.rows.load_state_dict(state)
