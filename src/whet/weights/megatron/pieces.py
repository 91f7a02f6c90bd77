"""Parts of stacked tensors in the files of torch.distributed.checkpoint, read and written one at a time."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from whet.errors import ModelError
from whet.weights import torch_dist
from whet.weights.torch_dist import METADATA_FILE, SHARD_GB, check_files

Index = tuple[int, ...]


class Pieces:
    """The tensors in a folder, of which a part is read by its place in the leading dimensions."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError for a folder that was not written to its end."""
        self.folder = folder
        metadata = torch_dist.Reader(folder).read_metadata()
        check_files(folder, metadata)
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._kept = {
            key: kept for key, kept in metadata.state_dict_metadata.items() if isinstance(kept, TensorStorageMetadata)
        }

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def fits(self, key: str, index: Index, of: Index) -> bool:
        """Whether there is such a tensor, whose leading dimensions have these sizes."""
        return key in self._kept and tuple(self._kept[key].size[: len(of)]) == of

    def entry(self, key: str, index: Index) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of the part at `index`."""
        kept = self._kept[key]
        return kept.properties.dtype, tuple(kept.size[len(index) :])

    def read(self, key: str, index: Index) -> Tensor:
        """The part at `index`, put together from whatever pieces were written. Raises ModelError for a damaged one."""
        dtype, shape = self.entry(key, index)
        whole = torch.empty((*(1 for _ in index), *shape), dtype=dtype)
        begins, ends = (*index, *(0 for _ in shape)), (*(i + 1 for i in index), *shape)
        for chunk in self._kept[key].chunks:
            first = [max(a, b) for a, b in zip(begins, chunk.offsets, strict=True)]
            sizes = zip(ends, chunk.offsets, chunk.sizes, strict=True)
            last = [min(end, offset + size) for end, offset, size in sizes]
            if all(a < b for a, b in zip(first, last, strict=True)):
                piece = self._load(self._places[MetadataIndex(key, chunk.offsets)], key)
                whole[_span(first, last, begins)] = piece[_span(first, last, chunk.offsets)]
        return whole.reshape(shape)

    def _load(self, where: _StorageInfo, key: str) -> Tensor:
        with (self.folder / where.relative_path).open("rb") as file:
            file.seek(where.offset)
            content = io.BytesIO(file.read(where.length))
        try:
            return torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load says what it stumbles over in many ways
            said = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{self.folder}: {key} cannot be read ({said}); copy it again, or write it again"
            ) from error


def _span(first: list[int], last: list[int], origin: tuple[int, ...] | torch.Size) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(first, last, origin, strict=True))


class PiecesWriter:
    """Files as if processes had each written some of the pieces; complete at the end of its context."""

    def __init__(self, folder: Path, shard_gb: float | None = None) -> None:
        self.folder, self._limit = folder, (shard_gb or SHARD_GB) * 1e9
        self._file: BinaryIO | None = None
        self._number = 0
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._kept: dict[str, TensorStorageMetadata] = {}

    def write(self, key: str, index: Index, of: Index, tensor: Tensor) -> None:
        """Write what stands at `index` of the leading dimensions, of sizes `of`, of the tensor `key`."""
        if self._file is not None and self._file.tell() >= self._limit:
            self._file.close()
            self._file, self._number = None, self._number + 1
        name = f"__{self._number}_0{DEFAULT_SUFFIX}"
        self._file = self._file or (self.folder / name).open("wb")
        begin = self._file.tell()
        # A view would bring along all of the memory that it looks into.
        own = (
            tensor if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        )
        torch.save(own.reshape((*(1 for _ in index), *own.shape)), self._file)
        offsets = torch.Size((*index, *(0 for _ in tensor.shape)))
        self._places[MetadataIndex(key, offsets)] = _StorageInfo(name, begin, self._file.tell() - begin)
        kept = self._kept.setdefault(
            key,
            TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size((*of, *tensor.shape)), []),
        )
        kept.chunks.append(ChunkStorageMetadata(offsets, torch.Size((*(1 for _ in index), *tensor.shape))))

    def __enter__(self) -> PiecesWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._file is not None:
            self._file.close()
        if failure[0] is not None:
            return
        metadata = Metadata(state_dict_metadata=dict(self._kept), storage_data=self._places, storage_meta=StorageMeta())
        metadata.version = CURRENT_DCP_VERSION
        with (self.folder / METADATA_FILE).open("wb") as file:
            pickle.dump(metadata, file)
