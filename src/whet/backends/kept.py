"""Checkpoints of a model in shards: weights streamed through rank 0, the optimizer written by every rank for itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, load, save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedTokenizerBase

from whet.checkpoints.state import OPTIMIZER
from whet.errors import CheckpointError, ModelError, TrainingError
from whet.models.adapters import has_adapter
from whet.models.export import save_adapter, save_settings, unsaved_names
from whet.models.initial import Anchored
from whet.models.restore import adapter_keys
from whet.weights import hf
from whet.weights.names import in_files
from whet.weights.stored import Entry, Stored
from whet.weights.torch_dist import Reader

FOLDER = "optimizer"
"""Beside the weights: what every rank wrote of the optimizer, for torch.distributed.checkpoint."""

Named = Iterator[tuple[str, Tensor]]


def require_finite(parts: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Raises TrainingError, on all ranks, where a weight is not finite: what follows from NaN is NaN.

    `parts` is what this rank has of each trained weight, in the same order on every rank.
    """
    found = [(name, (~torch.isfinite(part)).any()) for name, part in parts]
    if not found:  # a frozen model
        return
    bad = torch.stack([one.to(device) for _, one in found]).float()
    dist.all_reduce(bad, dist.ReduceOp.MAX)
    if bad.any():
        raise TrainingError(
            f"{found[int(bad.argmax())][0]} holds numbers that are not finite, so nothing was saved; go on from an "
            "earlier checkpoint with a lower optim.lr"
        )


def write_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: Named) -> None:
    """Write a model as `models.export.save_model` does, on rank 0, while every other rank runs through `weights`.

    These are all of the model's or, of one with an adapter, those that are trained; by the model's own names.
    """
    try:
        if dist.get_rank() == 0:
            write = _write_adapter if has_adapter(model) else _write_weights
            write(model, folder, weights)
            if has_adapter(model):
                tokenizer.save_pretrained(folder)
            else:
                save_settings(model, tokenizer, folder)
    finally:
        for _ in weights:  # whatever happened: the ranks gather them together
            pass


def _write_weights(model: Any, folder: Path, weights: Named) -> None:
    unsaved = unsaved_names(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in unsaved}
    shapes = ((name, torch.empty(t.shape, dtype=t.dtype, device="meta")) for name, t in state.items())
    entries = {name: Entry(t.dtype, tuple(t.shape)) for name, t in in_files(model, shapes)}
    kept = ((name, tensor.cpu()) for name, tensor in weights if name not in unsaved)
    buffers = ((name, tensor.cpu()) for name, tensor in model.named_buffers() if name in state)
    folder.mkdir(parents=True, exist_ok=True)
    hf.write(Stored(entries, lambda: in_files(model, chain(kept, buffers)), {}), folder)


def _write_adapter(model: nn.Module, folder: Path, weights: Named) -> None:
    anchored = {name: module for name, module in model.named_modules() if isinstance(module, Anchored)}
    state: dict[str, Tensor] = {}
    for name, tensor in weights:
        within, _, last = name.rpartition(".")
        if within in anchored:  # one weight in files
            half = anchored[within]
            assert last == "trained", "the other half is no parameter"
            name, tensor = f"{within}.weight", torch.cat([tensor, half.fixed.to(tensor.device)], half.dim)
        state[name] = tensor.cpu().clone()
    save_adapter(model, folder, {key: state[name] for name, key in adapter_keys(model).items()})


def write_optimizer(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Every rank writes its part of the optimizer's state; nothing before the first step."""
    if state := _state(optimizer, named):
        save(state, storage_writer=FileSystemWriter(folder / FOLDER))


def read_optimizer(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Set this rank's part of the optimizer's state, however many ranks wrote it.

    Raises CheckpointError where it was written for other weights.
    """
    require_spread(folder)
    optimizer.state.clear()
    if not (folder / FOLDER).is_dir():  # no step had been made
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": torch.zeros((), device=weight.device), **moments}
    state = _state(optimizer, named)
    reader = Reader(folder / FOLDER)
    try:
        _check(state, reader.read_metadata().state_dict_metadata, folder)
        load(state, storage_reader=reader)
    except (ModelError, CheckpointException, OSError) as error:
        raise CheckpointError(f"{folder / FOLDER} cannot be read ({error}); resume from another checkpoint") from error


def require_spread(folder: Path) -> None:
    """Raises CheckpointError for what one process wrote, with an optimizer in one file: ranks read only their own."""
    if (folder / OPTIMIZER).is_file():
        raise CheckpointError(
            f"{folder} was written by the backend local, whose optimizer is not divided over processes; go on with "
            "backend.use: local, or give it as model.path, with another output_dir, to begin with its weights"
        )


def _state(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, weight in named:
        found |= {f"{name}.{key}": value for key, value in optimizer.state.get(weight, {}).items()}
    return found


def _check(state: Mapping[str, Tensor], saved: Mapping[str, Any], folder: Path) -> None:
    sizes = {name: tuple(one.size) for name, one in saved.items() if isinstance(one, TensorStorageMetadata)}
    ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if sizes != ours:
        name = next(name for name in sorted({*sizes, *ours}) if sizes.get(name) != ours.get(name))
        raise CheckpointError(
            f"{folder / FOLDER} has {name} {sizes.get(name, 'not at all')}, and the model {ours.get(name, 'not')}; "
            "resume with the model, adapter and freezing that the checkpoint was written with"
        )
