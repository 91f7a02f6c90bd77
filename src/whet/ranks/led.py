"""A model that is spread over many ranks, as the loop sees it: one backend, driven from rank 0."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.batch import Batch
from whet.config.backend import BackendConfig
from whet.errors import TrainingError
from whet.losses.base import PER_SEQUENCE, Output
from whet.methods import Term
from whet.models.digest import digest
from whet.ranks.crew import Crew
from whet.ranks.share import Share, shares
from whet.tally import Tally, divisible


class Led:
    """Implements `backends.protocol.Backend` by what the ranks' own backends (`RankBackend`) do together.

    Batches are global: each data rank gets some of the units, and what comes back is put together again. `own` is the
    backend of the leader's rank.
    """

    def __init__(self, crew: Crew, role: str, own: Any, config: BackendConfig) -> None:
        self._crew, self._role, self._config = crew, role, config
        self.own = own
        self.flops = 0.0
        """Floating-point operations of all ranks so far."""
        crew.backends[role] = own

    @property
    def shares_prefixes(self) -> bool:
        """Whether batches for this backend are to be collated with shared prefixes."""
        return self.own.shares_prefixes

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s that all devices together can reach at most; None where that is not known."""
        peak = self.own.peak_flops
        return None if peak is None else peak * self._crew.world.size

    @property
    def model(self) -> Any:
        """The leader's part of the model; its configuration is the whole one's."""
        return self.own.model

    @property
    def compute(self) -> Any:
        """How the leader's rank computes."""
        return self.own.compute

    def forward(self, batch: Batch, outputs: Set[Output]) -> dict[Any, Tensor]:
        """Outputs over the whole batch, on the batch's device."""
        batch = batch.refined(self._room)
        divided = self._divide(batch)
        replies = self._on_shares("forward", divided, outputs)
        results: dict[Any, Tensor] = {}
        for (units, _), (found, _) in zip(divided, replies, strict=True):
            if not units:
                continue
            places = _places(batch, units)
            for name, values in found.items():
                kind = "sequence" if name in PER_SEQUENCE else "token"
                size = batch.num_sequences if kind == "sequence" else batch.num_tokens
                if name not in results:
                    results[name] = values.new_zeros(size, *values.shape[1:]).to(batch.tokens.device)
                results[name][places[kind]] = values.to(batch.tokens.device)
        return results

    def forward_backward(self, batch: Batch, terms: Sequence[Term]) -> dict[str, float]:
        """Add the gradient of the batch's loss; see `Backend.forward_backward`."""
        tally = Tally(terms)
        batch = divisible(batch, terms, self._room)
        for state, _ in self._on_shares("forward_backward", self._divide(batch), terms):
            tally.absorb(state)
        result = tally.finish()
        if not math.isfinite(result["loss"]):
            raise TrainingError(tally.not_finite(result["loss"]))
        return result

    def optim_step(self, lr: float) -> dict[str, float]:
        """Clip, update, clear, on all ranks. Returns `grad_norm` of the whole gradient before clipping."""
        return self._crew.call(self._role, "optim_step", lr)[0]

    def save(self, folder: Path) -> None:
        """Weights as transformers or peft load them, what each rank holds of the optimizer, and its random state."""
        self._crew.call(self._role, "save", folder)
        if self._role == "policy":
            self._crew.call("rank", "save_rng", folder)

    def load(self, folder: Path) -> None:
        """Go back to exactly what `save` wrote, with however many ranks that was."""
        self._crew.call(self._role, "load", folder)
        if self._role == "policy":
            self._crew.call("rank", "load_rng", folder)

    def export_weights(self, folder: Path) -> None:
        """Write the whole model's weights in a form that transformers or peft load."""
        self._crew.call(self._role, "export_weights", folder)

    def weights(self, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, full tensor), gathered one after the other; those that are trained alone, if asked."""
        return self._crew.stream(self._role, "weights", trained=trained)

    def move_towards(self, other: Any, share: float) -> None:
        """Make every weight `share` of the other's and the rest of its own."""
        assert isinstance(other, Led), "models that move towards one another are spread alike"
        self._crew.call("rank", "move_towards", self._role, other._role, share)

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Compute outputs at this temperature for as long as this lasts."""
        before = self._crew.call(self._role, "set_temperature", temperature)[0]
        try:
            yield
        finally:
            self._crew.call(self._role, "set_temperature", before)

    def offload(self) -> None:
        """Free the accelerators for engines that share them."""
        self._crew.call(self._role, "offload")

    def onload(self) -> None:
        """Take the accelerators back."""
        self._crew.call(self._role, "onload")

    def describe(self) -> dict[str, Any]:
        """What was chosen at start-up, and how the model is spread."""
        return {**self.own.describe(), "processes": self._crew.world.size, "layout": str(self._crew.layout)}

    def digest(self) -> str:
        """A hash of what outputs follow from, an adapter left out."""
        return digest(self.own.model, self.weights())

    def _divide(self, batch: Batch) -> list[tuple[list[int], Share]]:
        costs = [self.own.counts.forward(tree, 0) for tree in batch.trees]
        return shares(batch, self._crew.layout.data, costs, self._room, self._config.micro_batch_size)

    @property
    def _room(self) -> int:
        """Most tokens in one micro-batch, which ranks that share tokens hold together."""
        return self._config.max_tokens_per_device * self._crew.layout.context

    def _on_shares(
        self, method: str, divided: Sequence[tuple[list[int], Share]], about: Any
    ) -> list[tuple[Mapping[Any, Tensor], float]]:
        """What the method returned for each share, from the ranks that have it, and count what all computed."""
        layout = self._crew.layout
        replies = self._crew.call(self._role, method, about, shares=[share for _, share in divided])
        self.flops += sum(flops for _, flops in replies)
        found: dict[int, Any] = {}
        for rank, reply in enumerate(replies):
            if layout.reports(rank):
                found[layout.data_rank(rank)] = reply
        return [found[part] for part in range(layout.data)]


def _places(batch: Batch, units: Sequence[int]) -> dict[str, Tensor]:
    """Where the sequences and tokens of these units stand in the batch, in the order of the units."""
    by_unit = [torch.nonzero(batch.unit_ids == unit)[:, 0] for unit in units]
    sequences = torch.cat(by_unit)
    starts, ends = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
    spans = [torch.arange(int(starts[s]), int(ends[s])) for s in sequences.tolist()]
    return {"sequence": sequences, "token": torch.cat(spans)}
