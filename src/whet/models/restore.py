"""Read weights that `save_model` wrote back into a model that is there already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from whet.errors import CheckpointError
from whet.models.adapters import has_adapter
from whet.models.export import ADAPTER_WEIGHTS, unsaved_names
from whet.models.initial import Anchored
from whet.models.parts import base

REMEDY = "it was saved from another model or with another adapter"


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Set every weight (of the adapter, if there is one) to what `folder` holds, bit for bit.

    Raises CheckpointError when a file is missing or holds other weights than the model has.
    """
    state = _read(model, Path(folder))
    missing: list[str] = []
    try:
        if has_adapter(model):
            from peft import set_peft_model_state_dict

            unexpected = set_peft_model_state_dict(model, state).unexpected_keys
        else:
            state = _as_in_memory(model, state)
            missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # tensors of another shape
        first = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{folder} does not fit the model: {first}; {REMEDY}") from error
    _check_names(model, folder, missing, list(unexpected))


def saved_weights(model: nn.Module, folder: str | Path) -> dict[str, Tensor]:
    """What `load_weights` would set, by the names of the model's parameters and buffers; the model's own weights
    need not be there.

    Raises CheckpointError when a file is missing or holds other weights than the model has.
    """
    state, shapes = _read(model, Path(folder)), {name: tuple(w.shape) for name, w in _named(model)}
    if has_adapter(model):
        found = {name: state.pop(key) for name, key in adapter_keys(model).items() if key in state}
        missing, unexpected = [name for name in adapter_keys(model) if name not in found], list(state)
        found = _taken_apart(model, found)
    else:
        found = _as_in_memory(model, state)
        missing = [name for name, _ in model.named_parameters() if name not in found]
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        unexpected = [name for name in found if name not in shapes and name not in tied]
    _check_names(model, folder, missing, unexpected)
    for name, tensor in found.items():
        if tuple(tensor.shape) != shapes.get(name, tuple(tensor.shape)):
            raise CheckpointError(
                f"{folder} does not fit the model: {name} is {list(tensor.shape)}, expected {list(shapes[name])}; "
                f"{REMEDY}"
            )
    return {name: tensor for name, tensor in found.items() if name in shapes}


def adapter_keys(model: nn.Module) -> dict[str, str]:
    """From the names of an adapter's weights in the model's state to those in files of peft."""
    from peft import get_peft_model_state_dict

    names = [name for name, _ in _named(model)]
    names += [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Anchored)]
    marked = {name: torch.tensor(i) for i, name in enumerate(names)}
    kept = get_peft_model_state_dict(model, state_dict=marked, save_embedding_layers=False)
    return {
        names[int(mark)]: key for key, mark in kept.items() if not names[int(mark)].endswith((".trained", ".fixed"))
    }


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _taken_apart(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that stand as one in files and as two halves in the model."""
    parts = {
        f"{name}.weight": (name, module.dim) for name, module in model.named_modules() if isinstance(module, Anchored)
    }
    result: dict[str, Tensor] = {}
    for key, tensor in found.items():
        if key in parts:
            name, dim = parts[key]
            result[f"{name}.trained"], result[f"{name}.fixed"] = tensor.chunk(2, dim)
        else:
            result[key] = tensor
    return result


def _read(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    names = [ADAPTER_WEIGHTS] if has_adapter(model) else sorted(p.name for p in folder.glob("model*.safetensors"))
    if not names or not all((folder / name).is_file() for name in names):
        missing_file = names[0] if names else "model.safetensors"
        raise CheckpointError(f"{folder} holds no {missing_file}; is it a checkpoint of this run?")
    return {key: tensor for name in names for key, tensor in load_file(folder / name).items()}


def _as_in_memory(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of files as the model has them: some families fuse them, experts above all."""
    inner = base(model)
    own = set(inner.state_dict())
    if own.issuperset(state):
        return state
    score = {name: state.pop(name) for name in [*state] if name.startswith("score.")}
    options = {"config": inner.config, "state_dict": state, "dtype": inner.dtype, "output_loading_info": True}
    with torch.random.fork_rng(devices=[]):
        made, told = type(inner).from_pretrained(None, **options)
    lacking, unknown = set(told["missing_keys"]), dict.fromkeys(told["unexpected_keys"], torch.empty(0))
    return {**{n: w for n, w in made.state_dict().items() if n not in lacking}, **unknown, **score}


def _check_names(model: nn.Module, folder: str | Path, missing: list[str], unexpected: list[str]) -> None:
    unsaved = set(getattr(model, "all_tied_weights_keys", {})) | (set() if has_adapter(model) else unsaved_names(model))
    missing = [key for key in missing if key not in unsaved]
    if missing or unexpected:
        raise CheckpointError(
            f"{folder} does not fit the model: missing {missing[:3]}, unknown {list(unexpected)[:3]}; {REMEDY}"
        )
