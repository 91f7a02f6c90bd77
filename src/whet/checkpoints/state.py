"""What a run needs to go on as if nothing had happened, in safetensors and JSON: no pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from whet.errors import CheckpointError

OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
_STRUCTURE = "structure"


def save_tensors(nested: Any, path: str | Path) -> None:
    """Write dictionaries, lists and tuples of tensors and plain values to one safetensors file.

    The tensors are named by their place in it; the structure stands as JSON in the file's metadata.
    Keys may be strings and integers, values tensors, None, booleans, numbers and strings.
    """
    tensors: dict[str, Tensor] = {}
    structure = _describe(nested, "", tensors, set())
    save_file(tensors, Path(path), metadata={_STRUCTURE: json.dumps(structure)})


def load_tensors(path: str | Path) -> Any:
    """What `save_tensors` wrote, to the bit; tensors on the CPU. Raises CheckpointError."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})[_STRUCTURE])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; resume from another checkpoint") from None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); resume from another checkpoint") from error
    return _rebuild(structure, tensors)


def write_json(value: Any, path: str | Path) -> None:
    """Write plain values: data position, best metric, counters. Floats come back to the bit."""
    for key in _keys(value):
        # JSON would turn it into a string, and a look-up after the resume would find nothing.
        assert isinstance(key, str), f"{path}: key {key!r} is no string"
    Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote, tuples as lists. Raises CheckpointError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); resume from another checkpoint") from error


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the optimizer's state and parameter groups."""
    save_tensors(optimizer.state_dict(), folder / OPTIMIZER)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Set the optimizer to what `save_optimizer` wrote, on the devices of its parameters.

    Raises CheckpointError if it was written for parameters of another number or shape.
    """
    state = load_tensors(folder / OPTIMIZER)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = [index for group in state["param_groups"] for index in group["params"]]
    remedy = "resume with the model, adapter and freezing that the checkpoint was written with"
    if len(saved) != len(parameters):
        raise CheckpointError(
            f"{folder / OPTIMIZER} is for {len(saved)} trained tensors, but the model has {len(parameters)}; {remedy}"
        )
    for index, parameter in zip(saved, parameters, strict=True):
        for name, value in state["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{folder / OPTIMIZER} has {name} {list(value.shape)} for trained tensor {index}, "
                    f"but the model's is {list(parameter.shape)}; {remedy}"
                )
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(f"{folder / OPTIMIZER} does not fit: {error}; {remedy}") from error


def save_rng(folder: Path) -> None:
    """Write the state of every random generator of this process: Python's, numpy's, torch's, each GPU's."""
    legacy = np.random.get_state(legacy=False)
    state = {
        "python": random.getstate(),
        "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    save_tensors(state, folder / RNG)


def load_rng(folder: Path) -> None:
    """Set every random generator to what `save_rng` wrote; GPUs that are no longer there are left out."""
    state = load_tensors(folder / RNG)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)


def _describe(value: Any, place: str, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    """The value as JSON, with its tensors put into `tensors` under names that the JSON refers to."""
    if isinstance(value, Tensor):
        name = place or "value"
        while name in tensors:  # {"a.b": …} beside {"a": {"b": …}}
            name += "'"
        plain = value.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        # safetensors refuses tensors that share memory.
        if storage.data_ptr() in storages or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
        return {"tensor": name}
    if isinstance(value, dict):
        assert all(type(key) in (str, int) for key in value), f"{place}: keys are {list(value)[:5]}"
        return {
            "dict": [
                [key, _describe(item, f"{place}.{key}".lstrip("."), tensors, storages)] for key, item in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_describe(item, f"{place}.{i}".lstrip("."), tensors, storages) for i, item in enumerate(value)]}
    assert value is None or type(value) in (bool, int, float, str), f"{place} is a {type(value).__name__}"
    return value


def _rebuild(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _rebuild(item, tensors) for key, item in content}
    items = [_rebuild(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _keys(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for child in children:
        yield from _keys(child)
