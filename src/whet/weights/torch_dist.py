"""Folders of torch.distributed.checkpoint: `.metadata` and `.distcp` files, with a model's arguments beside them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from transformers import PreTrainedModel

from whet.errors import ModelError
from whet.models.scores import KEY as SCORE
from whet.models.source import read_json
from whet.weights.arguments import CONFIG, config_of, read_arguments, write_arguments
from whet.weights.names import in_files, parameter_names, skeleton
from whet.weights.stored import Entry, Layout, Stored, checked, noting

NAME = "torch_dist"
METADATA_FILE = ".metadata"
TOLD_FILE = "whet.json"
"""What torch.distributed.checkpoint has no place for: checksums, and the files of the folder it was made from."""
SHARD_GB = 5.0
PREFIXES = ("model.", "module.", "state_dict.")
"""Beneath which others keep the weights, beside an optimizer's state."""

# What the metadata of a checkpoint is made of. It is a pickle: anything else in it could be code, and is refused.
DESCRIBES = (
    *("ChunkStorageMetadata", "TensorProperties", "TensorStorageMetadata", "BytesStorageMetadata", "Metadata"),
    *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
)
PLANS = ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
SAFE = {
    *(("torch.distributed.checkpoint.planner", name) for name in PLANS),
    *(("torch.distributed.checkpoint.metadata", name) for name in DESCRIBES),
    *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
}


def recognise(folder: Path) -> bool:
    """Whether there are files of torch.distributed.checkpoint, complete or not."""
    return (folder / METADATA_FILE).is_file() or any(folder.glob(f"*{DEFAULT_SUFFIX}"))


def open_folder(folder: Path) -> Stored:
    """The model in a folder, however many processes wrote it, each tensor put together from its parts.

    Of a checkpoint that holds an optimizer as well, the model is read. Raises ModelError for a folder that was not
    written to its end, without configuration, or whose metadata holds more than a description of tensors.
    """
    reader = Reader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    check_files(folder, metadata)
    told = read_json(folder / TOLD_FILE) if (folder / TOLD_FILE).is_file() else {}
    inside = described(metadata)
    arguments = read_arguments(folder)
    if CONFIG not in arguments:
        raise ModelError(
            f"{folder} has no {CONFIG}: it holds weights alone; copy {CONFIG} and the tokenizer's files there from the "
            "model that was trained"
        )

    if not told:
        return _of_training(reader, inside, arguments, folder)
    layout = Layout(**told["layout"]) if told["layout"] else None
    order = [name for names in layout.files.values() for name in names] if layout else list(told["digests"])
    if set(order) != set(inside) or set(told["digests"]) != set(inside):
        raise ModelError(f"{folder / TOLD_FILE} lists other tensors than {METADATA_FILE}; convert the model again")

    def read() -> Iterator[tuple[str, Tensor]]:
        for name in order:
            yield name, reader.tensor(name, inside[name])

    entries = {name: inside[name] for name in order}
    return checked(Stored(entries, read, arguments, layout, told["digests"]), folder)


def write(stored: Stored, folder: Path, options: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint that torch.distributed.checkpoint loads, on any number of processes.

    Files are of `shard_gb` gigabytes or little more, named as if each were written by a process of its own; one tensor
    is in memory at a time. What the way back needs is beside them.
    """
    options = dict(options or {})
    shard_gb = options.pop("shard_gb", None) or SHARD_GB
    if options:
        raise ModelError(f"the format {NAME} has no option {', '.join(options)}")
    digests: dict[str, str] = {}
    write_tensors(noting(stored, digests).read(), folder, shard_gb=shard_gb)
    layout = stored.layout.to_json() if stored.layout is not None else None
    told = {"layout": layout, "digests": digests}
    (folder / TOLD_FILE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    write_arguments(stored.arguments, folder)


def write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path, *, shard_gb: float = SHARD_GB) -> int:
    """Write tensors as they come, each whole, and last of all what they are, without which the folder is not complete.

    Returns how many there were; of none nothing is written.
    """
    entries: dict[str, Entry] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    file: BinaryIO | None = None
    number = 0
    try:
        for name, tensor in tensors:
            if file is not None and file.tell() >= shard_gb * 1e9:
                file.close()
                file, number = None, number + 1
            file_name = f"__{number}_0{DEFAULT_SUFFIX}"
            file = file or (folder / file_name).open("wb")
            begin = file.tell()
            # A view would bring along all of the memory that it looks into.
            tensor = tensor.contiguous()
            torch.save(tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone(), file)
            places[MetadataIndex(name, [0] * tensor.dim())] = _StorageInfo(file_name, begin, file.tell() - begin)
            entries[name] = Entry(tensor.dtype, tuple(tensor.shape))
    finally:
        if file is not None:
            file.close()
    if entries:
        _write_metadata(entries, places, folder)
    return len(entries)


def described(metadata: Metadata) -> dict[str, Entry]:
    """The tensors that a checkpoint's metadata tells of."""
    return {
        name: Entry(kept.properties.dtype, tuple(kept.size))
        for name, kept in metadata.state_dict_metadata.items()
        if isinstance(kept, TensorStorageMetadata)
    }


def _write_metadata(entries: Mapping[str, Entry], places: dict[MetadataIndex, _StorageInfo], folder: Path) -> None:
    described = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=entry.dtype),
            torch.Size(entry.shape),
            [ChunkStorageMetadata(torch.Size([0] * len(entry.shape)), torch.Size(entry.shape))],
        )
        for name, entry in entries.items()
    }
    metadata = Metadata(
        state_dict_metadata=described,
        planner_data={name: (name,) for name in entries},
        storage_data=places,
        storage_meta=StorageMeta(),
    )
    metadata.version = CURRENT_DCP_VERSION
    with (folder / METADATA_FILE).open("wb") as file:
        pickle.dump(metadata, file)


class Reader(FileSystemReader):
    """PyTorch's reader, whose metadata cannot run code, and which reads tensor by tensor."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA_FILE
        if not path.is_file():
            raise ModelError(
                f"{self.path} has no {METADATA_FILE}: the checkpoint was not written to its end; take an earlier "
                "one, or write it again"
            )
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
        except ModelError:
            raise
        except Exception as error:  # whatever half a pickle leads to
            raise ModelError(f"{path} cannot be read ({error}); copy the folder again, or write it again") from error
        if not isinstance(metadata, Metadata) or not metadata.storage_data:
            raise ModelError(f"{path} describes no tensors; give a folder that torch.distributed.checkpoint wrote")
        return metadata

    def tensor(self, name: str, entry: Entry) -> Tensor:
        """A whole tensor, put together from the parts that processes wrote."""
        state = {name: torch.empty(entry.shape, dtype=entry.dtype)}
        planner = DefaultLoadPlanner()
        planner.set_up_planner(state, self.metadata, is_coordinator=True)
        plan = create_default_local_load_plan(planner.state_dict, self.metadata)
        try:
            self.read_data(plan, planner).wait()
        except Exception as error:  # torch.load says what it stumbles over in many ways
            said = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{self.path}: {name} cannot be read ({said}); copy it again, or write it again"
            ) from error
        return state[name]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self.metadata = metadata


class _Plan:
    """What Megatron-Core notes in the metadata of how it wrote them, which nothing here reads."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if is_dtype or (module, name) in SAFE:
            return super().find_class(module, name)
        if module == "megatron.core.dist_checkpointing.strategies.torch" and name.startswith("MCore"):
            return _Plan
        raise ModelError(f"{METADATA_FILE} asks to run {module}.{name}, which no checkpoint needs; it is not loaded")


def check_files(folder: Path, metadata: Metadata) -> None:
    """Raises ModelError where a part is missing or beyond the end of its file."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size < end:
            what = f"has {path.stat().st_size} bytes, expected {end}" if path.is_file() else "is missing"
            raise ModelError(f"{path} {what}; copy the folder again, or write it again")


def _of_training(reader: Reader, inside: Mapping[str, Entry], arguments: Mapping[str, bytes], folder: Path) -> Stored:
    """A checkpoint that no conversion wrote: a model's state, perhaps as it is in memory, perhaps with more."""
    names, model = _found(inside, arguments, folder)

    def read() -> Iterator[tuple[str, Tensor]]:
        pairs = ((name, reader.tensor(there, inside[there])) for name, there in names.items())
        return in_files(model, pairs) if model is not None else pairs

    shapes = (
        (name, torch.empty(inside[there].shape, dtype=inside[there].dtype, device="meta"))
        for name, there in names.items()
    )
    shapes = in_files(model, shapes) if model is not None else shapes
    return Stored({name: Entry(t.dtype, tuple(t.shape)) for name, t in shapes}, read, arguments)


def _found(
    inside: Mapping[str, Entry], arguments: Mapping[str, bytes], folder: Path
) -> tuple[dict[str, str], PreTrainedModel | None]:
    """The model's tensors in a checkpoint that training left: name -> name in the checkpoint, where the weights may lie
    beside an optimizer's state; and the model whose names they are, None for those of its files."""
    model = skeleton(config_of(arguments))
    in_memory = parameter_names(model)
    of_files = {name for name, _ in in_files(model, model.state_dict().items())}
    nearest: set[str] = in_memory
    for prefix in ("", *PREFIXES):
        there = {name.removeprefix(prefix): name for name in inside if name.startswith(prefix)}
        if SCORE in there:  # a reward model may do without its head for words
            in_memory, of_files = in_memory & {*there}, of_files & {*there}
        for names, owner in ((of_files, None), (in_memory, model)):
            if names and names <= there.keys():
                kept = sorted(names | ({SCORE} & there.keys()))
                return {name: there[name] for name in kept}, owner
            nearest = min(nearest, names - there.keys(), key=len)
    raise ModelError(
        f"{folder} is no checkpoint of the model in its {CONFIG}: it lacks {len(nearest)} of its weights "
        f"({min(nearest)} …); give the folder that the whole model was saved in"
    )
