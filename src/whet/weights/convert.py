"""`whet convert`: a model from one kind of folder into another, streamed, and held against what was read."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from whet.checkpoints.save import create
from whet.errors import ModelError
from whet.merge import merge_folder
from whet.models.source import ADAPTER_CONFIG
from whet.weights.arguments import config_of, with_dtype
from whet.weights.formats import format_named, format_of
from whet.weights.names import skeleton
from whet.weights.stored import Entry, Stored, noting
from whet.weights.verify import Compared, check_digests, check_room, compare_logits

Verify = Literal["none", "checksum", "logits"]
DTYPES = ("float32", "bfloat16", "float16")
MARGIN = 1.01
"""What files take beyond the numbers in them."""
Watch = Callable[[Iterable[tuple[str, Tensor]], str, int], Iterable[tuple[str, Tensor]]]
"""(items, what is done, how many) -> the items; so that whoever waits sees how far it is."""


def unwatched(items: Iterable[tuple[str, Tensor]], what: str, total: int) -> Iterable[tuple[str, Tensor]]:
    """The items, and nothing is shown."""
    return items


@dataclass(frozen=True)
class Converted:
    """What was written."""

    source: str
    """The kind of folder that was read."""
    num_tensors: int
    num_bytes: int
    checked: bool
    """Whether every tensor was read back and its checksum compared."""
    compared: Compared | None
    """The logits of both, where asked for."""


def convert(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    verify: Verify = "checksum",
    merge: bool = False,
    base_model: str | None = None,
    memory_bytes: int | None = None,
    options: Mapping[str, Any] | None = None,
    watch: Watch = unwatched,
) -> Converted:
    """Write the model in `source` into the new folder `output`, of the kind `to` (see `FORMATS`).

    Tensors pass through one at a time; the arguments beside them (configuration, tokenizer, template, card) go along.
    With `dtype` floating-point weights are converted, but for those that the architecture keeps in float32. With
    `merge` an adapter is merged into its base (`base_model`, or the one it names) on the way, which needs memory for
    both. `verify` reads back what was written and compares checksums, and `logits` runs both models besides, one
    after the other, which `memory_bytes` must hold. `options` are those of the format, `watch` is told of the way.
    Raises ModelError or CheckpointError; then there is no `output`.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    _check_output(source, output)
    how = _How(to, verify, memory_bytes, options or {}, watch)
    if not merge:
        return how.write(source, output, dtype)
    if not (source / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{source} holds no adapter ({ADAPTER_CONFIG}); leave out --merge")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.merged-", dir=output.parent) as draft:
        merge_folder(source, Path(draft) / "model", base_model=base_model, dtype=dtype)
        return how.write(Path(draft) / "model", output, None)


@dataclass(frozen=True)
class _How:
    """What a conversion was asked to do, whatever it converts."""

    to: str
    verify: Verify
    memory_bytes: int | None
    options: Mapping[str, Any]
    watch: Watch

    def write(self, source: Path, output: Path, dtype: str | None) -> Converted:
        """The folder `output`, whole and checked, or an error and no folder."""
        reader = format_of(source)
        before = reader.open_folder(source)
        stored = before if dtype is None else in_dtype(before, getattr(torch, dtype))
        if self.verify == "logits":
            check_room(before, self.memory_bytes)
        _check_disk(stored, output)
        compared: list[Compared] = []

        def fill(folder: Path) -> None:
            if found := self._fill(stored, before, folder, output):
                compared.append(found)

        create(output, fill)
        told = compared[0] if compared else None
        return Converted(reader.NAME, len(stored.entries), stored.nbytes, self.verify != "none", told)

    def _fill(self, stored: Stored, before: Stored, folder: Path, output: Path) -> Compared | None:
        writer, digests = format_named(self.to), dict[str, str]()
        writer.write(noting(self._watched(stored, "writing tensors"), digests), folder, self.options)
        if lacking := sorted(set(stored.entries) - set(digests)):
            raise ModelError(f"the source did not give {len(lacking)} of its tensors ({lacking[0]} …)")
        if self.verify == "none":
            return None
        written = writer.open_folder(folder)
        check_digests(self._watched(written, "reading them back"), digests, str(output))
        if self.verify == "checksum":
            return None
        return compare_logits(before, written, memory_bytes=self.memory_bytes)

    def _watched(self, stored: Stored, what: str) -> Stored:
        return replace(stored, read=lambda: iter(self.watch(stored.read(), what, len(stored.entries))))


def in_dtype(stored: Stored, dtype: torch.dtype) -> Stored:
    """The same model with its floating-point weights in another type.

    Those that its architecture keeps in float32 stay as they are. Raises ModelError for quantised weights, and while
    reading for numbers that the type does not reach.
    """
    if "quantization_config" in config_of(stored.arguments):
        raise ModelError("the weights are quantised, and --dtype would spoil them; leave it out")
    kept = _kept_in_float32(stored, dtype)

    def new(name: str, old: torch.dtype) -> torch.dtype:
        return old if not old.is_floating_point or any(part in name for part in kept) else dtype

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stored.read():
            made = tensor.to(new(name, tensor.dtype))
            if made.dtype != tensor.dtype and made.isinf().any() and not tensor.isinf().any():
                raise ModelError(f"{name} has numbers beyond the reach of {dtype}; convert to bfloat16 or float32")
            yield name, made

    entries = {name: Entry(new(name, entry.dtype), entry.shape) for name, entry in stored.entries.items()}
    if entries == stored.entries:
        return stored
    return replace(
        stored, entries=entries, read=read, layout=None, digests={}, arguments=with_dtype(stored.arguments, dtype)
    )


def _kept_in_float32(stored: Stored, dtype: torch.dtype) -> set[str]:
    """Parts of the names of weights that are not to be rounded to this type, as the architecture says."""
    if dtype == torch.float32:
        return set()
    model = skeleton(config_of(stored.arguments))
    kept = set(model._keep_in_fp32_modules_strict or ())
    return kept | set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else kept


def _check_output(source: Path, output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "is not empty" if output.is_dir() else "is a file"
        raise ModelError(f"{output} {what}; name a new folder")
    if output.resolve().is_relative_to(source.resolve()):
        raise ModelError(f"{output} lies within {source}, which is read; name a folder beside it")


def _check_disk(stored: Stored, output: Path) -> None:
    present = next(folder for folder in output.absolute().parents if folder.exists())
    free, needed = shutil.disk_usage(present).free, stored.nbytes * MARGIN
    if needed > free:
        raise ModelError(
            f"{output} will take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; make room, or name a folder "
            "on another disk"
        )
