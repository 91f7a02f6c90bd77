"""Folders as transformers write and load them: safetensors, in one file or in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.errors import ModelError
from whet.models.source import INDEXES, WEIGHTS, check_weights, read_json
from whet.weights.arguments import CONFIG, read_arguments, write_arguments
from whet.weights.stored import Entry, Layout, Stored
from whet.weights.tensor_file import NAMES, TensorFile, TensorFileWriter, file_order

NAME = "hf"
SHARD_GB = 5.0
METADATA = {"format": "pt"}
"""What transformers ask to find at the head of each file."""


def recognise(folder: Path) -> bool:
    """Whether there are weights of transformers' names."""
    return any((folder / name).is_file() for name in (*WEIGHTS, *INDEXES))


def open_folder(folder: Path) -> Stored:
    """The model in a folder, to be read file by file.

    Weights of PyTorch's own (`pytorch_model.bin`) are read without running any code that they hold.
    Raises ModelError for a folder without configuration, and for files that are missing, damaged or cut short.
    """
    check_weights(folder)
    arguments = read_arguments(folder)
    if CONFIG not in arguments:
        raise ModelError(f"{folder} has no {CONFIG}; copy it there from the model that the weights are of")
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    single = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if single is not None:
        index, names = None, {single.name: None}
    else:
        assert index is not None, "check_weights refuses a folder with neither"
        names = dict.fromkeys(read_json(index)["weight_map"].values())
    if any(name.endswith(".bin") for name in names):
        return _pickled([folder / name for name in names], arguments)
    files = {name: TensorFile(folder / name) for name in sorted(names)}
    entries = {name: entry for file in files.values() for name, entry in file.entries.items()}
    if index is not None:
        _check_index(index, files)
    layout = Layout(
        {name: list(file.entries) for name, file in files.items()},
        {name: file.metadata for name, file in files.items()},
        index.read_text(encoding="utf-8") if index is not None else None,
    )

    def read() -> Iterator[tuple[str, Tensor]]:
        for file in files.values():
            yield from file.read()

    return Stored(entries, read, arguments, layout)


def write(stored: Stored, folder: Path, options: Mapping[str, Any] | None = None) -> None:
    """Write a folder for transformers, one tensor in memory at a time.

    The files are those of `stored.layout`; without one, shards of at most `shard_gb` gigabytes in the order of the
    entries. Raises ModelError for a type that safetensors do not know.
    """
    options = dict(options or {})
    shard_gb = options.pop("shard_gb", None)
    if options:
        raise ModelError(f"the format {NAME} has no option {', '.join(options)}")
    if unknown := {name: entry.dtype for name, entry in stored.entries.items() if entry.dtype not in NAMES}:
        name, dtype = next(iter(unknown.items()))
        raise ModelError(f"{name} is {dtype}, which safetensors do not hold; convert with --dtype")
    layout = stored.layout
    if layout is None or shard_gb is not None:
        layout = divide(stored.entries, int((shard_gb or SHARD_GB) * 1e9))
    place = {name: file for file, names in layout.files.items() for name in names}
    writers = {
        file: TensorFileWriter(folder / file, {name: stored.entries[name] for name in names}, layout.metadata[file])
        for file, names in layout.files.items()
    }
    try:
        for name, tensor in stored.read():
            writers[place[name]].write(name, tensor)
    finally:
        for writer in writers.values():
            writer.close()
    if layout.index is not None:
        (folder / INDEXES[0]).write_text(layout.index, encoding="utf-8")
    write_arguments(stored.arguments, folder)


def divide(entries: Mapping[str, Entry], shard_bytes: int) -> Layout:
    """Shards of at most `shard_bytes`, or of a single tensor that is larger, in the order of the entries."""
    shards: list[dict[str, Entry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + entry.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += entry.nbytes
    if len(shards) == 1:
        names = [WEIGHTS[0]]
    else:
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    files = {name: list(file_order(shard)) for name, shard in zip(names, shards, strict=True)}
    index = None
    if len(shards) > 1:
        metadata = {"total_size": sum(entry.nbytes for entry in entries.values())}
        weight_map = {name: file for file, inside in files.items() for name in inside}
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    return Layout(files, {name: dict(METADATA) for name in names}, index)


def _check_index(index: Path, files: Mapping[str, TensorFile]) -> None:
    for name, file in read_json(index)["weight_map"].items():
        if name not in files[file].entries:
            raise ModelError(f"{index} says that {name} is in {file}, but it is not; copy both again")


def _pickled(files: list[Path], arguments: Mapping[str, bytes]) -> Stored:
    """Weights of `torch.save`: tensors only, mapped into memory where the file allows it."""
    entries = {name: Entry(t.dtype, tuple(t.shape)) for file in files for name, t in _load(file).items()}

    def read() -> Iterator[tuple[str, Tensor]]:
        for file in files:
            yield from _load(file).items()

    return Stored(entries, read, arguments)


def _load(file: Path) -> dict[str, Tensor]:
    load = partial(torch.load, file, map_location="cpu", weights_only=True)
    try:
        try:
            found = load(mmap=True)
        except RuntimeError:  # a file of the time before zip archives
            found = load()
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{file} cannot be read as tensors alone: {said}; code in it is not run. Give the model's safetensors"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ModelError(f"{file} holds more than named tensors; give the weights alone, best as safetensors")
    return found
