"""One rank of a model on Megatron, as tests/integration start it in its environment: python megatron_rank.py TASK.

A task is a JSON file: the settings of the backend, a model's folder, and what to do with it. Rank 0 leaves the answer
beside it.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import megatron_stand_ins  # noqa: E402, F401, before anything that imports megatron
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402

from whet.backends.device import Arithmetic  # noqa: E402
from whet.backends.megatron import MegatronBackend  # noqa: E402
from whet.batch import Batch  # noqa: E402
from whet.config.backend import BackendConfig  # noqa: E402
from whet.config.model import ModelConfig  # noqa: E402
from whet.config.optim import OptimConfig  # noqa: E402
from whet.errors import WhetError  # noqa: E402
from whet.models.load import load_tokenizer  # noqa: E402
from whet.ranks.layout import Layout  # noqa: E402
from whet.ranks.share import shares  # noqa: E402
from whet.tally import Tally  # noqa: E402


class Driven:
    """All ranks' backends at work on the same batches, without a leader."""

    def __init__(self, task: dict[str, Any], folder: str | None = None, **options: Any) -> None:
        self.config = BackendConfig(use="megatron", **task.get("backend", {}))
        self.layout = Layout.of(self.config, dist.get_world_size())
        model = ModelConfig(path=folder or task["model"])
        dtype = torch.bfloat16 if self.config.precision == "bf16" else None
        arithmetic = Arithmetic(torch.device("cpu"), dtype, "highest")
        optim = OptimConfig(**task["optim"]) if "optim" in task else None
        options = {"optim": optim, "layout": self.layout, **task.get("options", {}), **options}
        torch.manual_seed(0)
        self.own = MegatronBackend(model, load_tokenizer(model), self.config, arithmetic, **options)

    def _replies(self, method: str, batch: Batch, about: Any) -> tuple[list[tuple[list[int], Any]], list[Any]]:
        costs = [self.own.counts.forward(tree, 0) for tree in batch.trees]
        tokens = self.config.max_tokens_per_device * self.layout.context
        divided = shares(batch, self.layout.data, costs, tokens, self.config.micro_batch_size)
        rank = dist.get_rank()
        share = divided[self.layout.data_rank(rank)][1]
        reply, _ = getattr(self.own, method)(share, about)
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, reply)
        reports = {self.layout.data_rank(r): told[r] for r in range(len(told)) if self.layout.reports(r)}
        return divided, [reports[part] for part in range(self.layout.data)]

    def forward(self, batch: Batch, outputs: set[str]) -> dict[str, torch.Tensor]:
        divided, replies = self._replies("forward", batch, outputs)
        found: dict[str, torch.Tensor] = {}
        for (units, _), reply in zip(divided, replies, strict=True):
            if units:
                rows = torch.isin(batch.unit_ids, torch.tensor(units))
                for name, values in reply.items():
                    places = rows if name == "scores" else rows[batch.sequence_ids]
                    found.setdefault(name, values.new_zeros(len(places)))[places] = values
        return found

    def step(self, batch: Batch, terms: Any, lr: float) -> dict[str, float]:
        tally = Tally(terms)
        for state in self._replies("forward_backward", batch, terms)[1]:
            tally.absorb(state)
        return {**tally.finish(), **self.own.optim_step(lr)}


def outputs(task: dict[str, Any]) -> dict[str, Any]:
    """What the model computes of a batch, and the folder it exports."""
    driven = Driven(task)
    if "export" in task:
        driven.own.export_weights(Path(task["export"]))
    names = {name: list(tensor.shape) for name, tensor in driven.own.weights()}
    found = driven.forward(torch.load(task["batch"], weights_only=False), set(task["outputs"]))
    return {"outputs": {name: values.tolist() for name, values in found.items()}, "names": names}


def training(task: dict[str, Any]) -> dict[str, Any]:
    """Metrics of each step over batches; saved after `save_at` steps, or begun with what was saved in `resume`."""
    driven = Driven(task)
    if "resume" in task:
        driven.own.load(Path(task["resume"]))
    batches, terms = torch.load(task["batches"], weights_only=False)
    metrics = []
    for number, batch in enumerate(batches):
        if number == task.get("save_at"):
            driven.own.save(Path(task["save"]))
        if number >= task.get("begin_at", 0):
            metrics.append(driven.step(batch, terms, task["lr"]))
    if "export" in task:
        driven.own.export_weights(Path(task["export"]))
    return {"metrics": metrics, "about": driven.own.describe()}


def stored(task: dict[str, Any]) -> dict[str, Any]:
    """Weights by Megatron's own checkpoints: read those of `load` into the model, write it to `save`."""
    driven = Driven(task)
    decoder = driven.own.decoder
    state = {name: part for name, part in decoder.sharded_state_dict().items() if not name.endswith("_extra_state")}
    if "load" in task:
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.zero_()
        found = dist_checkpointing.load(state, task["load"])
        decoder.load_state_dict(found, strict=False)
    if "save" in task:
        dist_checkpointing.save(state, task["save"])
    driven.own.export_weights(Path(task["export"]))
    return {}


def refusal(task: dict[str, Any]) -> dict[str, Any]:
    """What the backend says to settings that it does not take."""
    try:
        Driven(task)
    except WhetError as error:
        return {"error": str(error)}
    return {"error": ""}


DO = {"outputs": outputs, "training": training, "stored": stored, "refusal": refusal}


def main() -> None:
    logging.disable(logging.WARNING)
    tasks = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for task in json.loads(tasks.read_text()):
        answer = DO[task["do"]](task)
        if dist.get_rank() == 0:
            Path(task["answer"]).write_text(json.dumps(answer))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    for child in multiprocessing.active_children():  # Megatron's, that wait for more to write
        child.terminate()
        child.join(10)
    os._exit(0)  # what Megatron leaves behind takes seconds to go
