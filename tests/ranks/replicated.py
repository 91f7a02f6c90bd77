"""A backend of one's own over several processes, the simplest there is: every rank has the whole model.

What a rank does with its share is what the local backend does; gradients are added up before each update.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from whet.backends.local import LocalBackend
from whet.models.load import load_model
from whet.tally import Tally


class Replicated:
    """See `backends.protocol.RankBackend`. `WHET_TEST_FAULT=METHOD:RANK:HOW` dies, stops, raises or sleeps there."""

    def __init__(self, model, tokenizer, config, arithmetic, *, layout, scores, frozen, optim=None, **options):
        loaded = load_model(model, arithmetic.device, scores=scores).requires_grad_(not frozen)
        self.local = LocalBackend(loaded, tokenizer, config, arithmetic, optim=optim, **options)
        self.model, self.compute, self.counts = self.local.model, self.local.compute, self.local.counts
        self.shares_prefixes, self.peak_flops = self.local.shares_prefixes, None

    def forward(self, share, outputs):
        _fault("forward")
        return self.local.forward(share.batch, outputs), 0.0

    def forward_backward(self, share, terms):
        _fault("forward_backward")
        tally, outputs = Tally(terms), frozenset().union(*(term.outputs for term in terms))
        self.model.train()
        with self.compute.installed():
            for units, micro in share.micros():
                if units:
                    loss = tally.add(self.compute(micro, outputs), micro)
                    if loss.requires_grad:
                        loss.backward()
        return tally.state(), 1.0

    def optim_step(self, lr):
        _fault("optim_step")
        for weight in self.model.parameters():
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                dist.all_reduce(weight.grad)
        return self.local.optim_step(lr)

    def set_temperature(self, temperature: float) -> float:
        before, self.compute.temperature = self.compute.temperature, temperature
        return before

    def save(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            self.local.save(folder)

    def load(self, folder: Path) -> None:
        self.local.load(folder)

    def export_weights(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            self.local.export_weights(folder)

    def weights(self, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.local.weights(trained=trained):
            dist.barrier()  # as if it had to be gathered
            yield name, weight

    def move_towards(self, other, share):
        self.local.move_towards(other.local, share)

    def describe(self):
        return self.local.describe()


def _fault(method: str) -> None:
    where, rank, how = os.environ.get("WHET_TEST_FAULT", "::").split(":")
    if method != where or dist.get_rank() != int(rank):
        return
    if how == "raise":
        raise RuntimeError("the disk of this rank is on fire")
    if how == "sleep":
        time.sleep(3600)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
