"""One safetensors file, read and written tensor by tensor.

The safetensors package maps files into memory and writes them from tensors that are all there at once; a model of any
size passes through here with one of its tensors in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from whet.errors import ModelError
from whet.weights.stored import Entry, as_bytes

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
}
"""The format's names of what tensors are made of. Source: the safetensors specification."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8


class TensorFile:
    """A safetensors file open for reading: its header, and any tensor of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header, self._start = _read_header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._offsets: dict[str, int] = {}
        self.entries: dict[str, Entry] = {}
        """In the order in which the tensors stand in the file."""
        for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if told["dtype"] not in DTYPES:
                raise ModelError(f"{path}: {name} is of type {told['dtype']}, expected one of {', '.join(DTYPES)}")
            self.entries[name] = Entry(DTYPES[told["dtype"]], tuple(told["shape"]))
            self._offsets[name] = told["data_offsets"][0]

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, one at a time, in the order of the file."""
        with self.path.open("rb") as file:
            for name in self.entries:
                yield name, self._tensor(file, name)

    def _tensor(self, file: BinaryIO, name: str) -> Tensor:
        entry = self.entries[name]
        buffer = bytearray(entry.nbytes)
        file.seek(self._start + self._offsets[name])
        if file.readinto(buffer) != entry.nbytes:
            raise ModelError(f"{self.path} is cut short in {name}; copy or download it again")
        if not buffer:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(entry.dtype).reshape(entry.shape)


class TensorFileWriter:
    """A safetensors file whose tensors are known before, and written in any order."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        self.path, self.entries = path, entries
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._offsets: dict[str, int] = {}
        end = 0
        for name, entry in entries.items():
            begin, end = end, end + entry.nbytes
            self._offsets[name] = begin
            header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
        # As the safetensors package writes it: compact, and padded so that the numbers are aligned.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._start = 8 + len(text)
        self._missing = set(entries)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place. It must be what was announced."""
        found = Entry(tensor.dtype, tuple(tensor.shape))
        assert found == self.entries[name], f"{name} is {found}, announced as {self.entries[name]}"
        self._file.seek(self._start + self._offsets[name])
        self._file.write(as_bytes(tensor))
        self._missing.discard(name)
        if not self._missing:
            self.close()

    def close(self) -> None:
        self._file.close()


def file_order(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """In the order in which the safetensors package puts tensors into a file: widest type first, then by name."""
    return dict(sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin. Raises ModelError for a file that is damaged or cut short."""
    size = path.stat().st_size
    header: dict[str, Any] = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length <= size:
            try:
                header = json.loads(file.read(length))
            except ValueError:
                header = {}
    tensors = [told for name, told in header.items() if name != "__metadata__"]
    whole = bool(header) and all(_is_sound(told) for told in tensors)
    end = max((told["data_offsets"][1] for told in tensors), default=0) if whole else 0
    if not whole or 8 + length + end != size:
        raise ModelError(f"{path} is damaged or cut short ({size} bytes); copy or download it again")
    return header, 8 + length


def _is_sound(told: dict[str, Any]) -> bool:
    """Whether a tensor's place is as long as its type and shape say."""
    begin, end = told["data_offsets"]
    dtype = DTYPES.get(told["dtype"])
    return dtype is None or end - begin == math.prod(told["shape"]) * dtype.itemsize
