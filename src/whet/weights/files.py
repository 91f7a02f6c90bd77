"""Weights in a folder that an engine can load: safetensors in buckets, complete or not there at all."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from whet.errors import EngineError
from whet.weights.buckets import buckets, num_bytes

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "whet-weights-"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Written:
    """A complete set of weights: the folder, its files in order, and their bytes."""

    folder: Path
    files: tuple[Path, ...]
    size: int


class WeightFolder:
    """A place for one set of weights after another, of which all but the last are removed.

    `beside` is a model's folder whose configuration and tokenizer are put beside the weights. Everything goes when it
    is closed, or when the program ends; what a killed program left behind goes when the next begins.
    """

    def __init__(self, place: Path, beside: Path | None = None) -> None:
        try:
            place.mkdir(parents=True, exist_ok=True)
            sweep(place)
            self.place = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=place))
        except OSError as error:
            raise EngineError(f"weights cannot be written to {place}: {error}; set engine.publish.folder") from error
        self._beside = beside
        self._last: Path | None = None
        atexit.register(self.close)

    def write(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        version: int,
        bucket_bytes: int,
        describe: Callable[[Iterable[str]], Mapping[str, str]] | None = None,
    ) -> Written:
        """Write a set of weights; `describe` tells what a file says of its tensors.

        Raises EngineError where there is no room.
        """
        target = self.place / f"v{version}"
        partial = self.place / f"v{version}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        names: dict[str, str] = {}
        size = 0
        try:
            for number, bucket in enumerate(buckets(tensors, bucket_bytes)):
                file = f"model-{number:05d}.safetensors"
                held = {name: tensor.cpu() for name, tensor in bucket}
                save_file(held, partial / file, metadata={"format": "pt", **(describe(held) if describe else {})})
                names |= dict.fromkeys(held, file)
                size += sum(map(num_bytes, held.values()))
            (partial / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": names}))
            self._complete(partial)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise EngineError(
                f"weights cannot be written to {self.place} ({size / 2**20:.0f} MiB were): {error}; make room, or set "
                "engine.publish.folder"
            ) from error
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        return Written(target, tuple(target / file for file in dict.fromkeys(names.values())), size)

    def keep_only(self, written: Written) -> None:
        """Remove what came before: nobody reads it any more."""
        for folder in self.place.iterdir():
            if folder != written.folder:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        atexit.unregister(self.close)
        shutil.rmtree(self.place, ignore_errors=True)

    def _complete(self, folder: Path) -> None:
        if self._beside is None:
            return
        for file in self._beside.iterdir():
            if file.suffix in (".json", ".txt", ".model", ".jinja") and "safetensors" not in file.name:
                with contextlib.suppress(FileExistsError):
                    (folder / file.name).symlink_to(file.resolve())


def place_for(folder: str | None, output_dir: Path, size: int, *, local: bool) -> Path:
    """Where weights of so many bytes go: as told, or memory that everybody on this machine can read, or the disk."""
    if folder is not None:
        return Path(folder).expanduser().absolute()
    in_memory = local and SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
    # Two sets are there while one takes the place of the other.
    if in_memory and shutil.disk_usage(SHARED_MEMORY).free > 2.5 * size:
        return SHARED_MEMORY
    return output_dir / "weights"


def sweep(place: Path) -> None:
    """Remove what programs that are no more have left."""
    for folder in place.glob(f"{PREFIX}*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def to_dtype(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterable[tuple[str, Tensor]]:
    """The tensors as the engine holds them: floating-point ones in its type."""
    for name, tensor in tensors:
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
