"""A model as it lies in files: which tensors there are, how they are read one by one, and what lies beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from whet.errors import ModelError


@dataclass(frozen=True)
class Entry:
    """What a tensor is, without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Layout:
    """How the tensors are divided over the files of a Hugging Face folder, so that the way back makes the same files.

    `files` has, by name, the tensors in the order in which they stand in the file; `metadata` the strings at the
    head of each file; `index` is the text of the file that lists them all, None where there is a single file.
    """

    files: dict[str, list[str]]
    metadata: dict[str, dict[str, str]]
    index: str | None

    def to_json(self) -> dict[str, Any]:
        return {"files": self.files, "metadata": self.metadata, "index": self.index}


@dataclass(frozen=True)
class Stored:
    """A model in files, under the names and with the shapes of its Hugging Face folder.

    `read` begins a new pass over all tensors, in the order of `entries` where it can; each is valid until the next is
    asked for, so that a pass holds one of them at a time. `arguments` are the small files beside the weights
    (configuration, tokenizer, chat template, card) by name. `digests` are the checksums written down with the
    tensors (see `digest`), empty where there are none.
    """

    entries: Mapping[str, Entry]
    read: Callable[[], Iterator[tuple[str, Tensor]]]
    arguments: Mapping[str, bytes]
    layout: Layout | None = None
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


class Format(Protocol):
    """One way to keep a model in a folder. A module with these functions and this constant is one."""

    NAME: str
    """What it is called on the command line."""

    def recognise(self, folder: Path) -> bool:
        """Whether the folder is of this kind, by the names of its files; it may still be damaged."""
        ...

    def open_folder(self, folder: Path) -> Stored:
        """What the folder holds. Reads no weights yet. Raises ModelError for a damaged or half-written one."""
        ...

    def write(self, stored: Stored, folder: Path, options: Mapping[str, Any]) -> None:
        """Write everything into an empty folder, in one pass. Raises ModelError for options that it does not know."""
        ...


def digest(tensor: Tensor) -> str:
    """BLAKE2b, 128 bits, of a tensor's dtype, shape and numbers, as hex."""
    result = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    result.update(as_bytes(tensor))
    return result.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in memory; no copy is made of one that is contiguous, on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def checked(stored: Stored, where: Path) -> Stored:
    """The same, but reading a tensor whose checksum differs from that written down with it raises ModelError."""
    if not stored.digests:
        return stored

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stored.read():
            if name in stored.digests and digest(tensor) != stored.digests[name]:
                raise ModelError(
                    f"{where} is damaged: {name} is not what was written (its checksum differs); convert it again from "
                    "its source, or copy it again"
                )
            yield name, tensor

    return replace(stored, read=read)


def noting(stored: Stored, into: dict[str, str]) -> Stored:
    """The same, with the checksum of every tensor that is read put down in `into`."""

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stored.read():
            into[name] = digest(tensor)
            yield name, tensor

    return replace(stored, read=read)
