"""The state of an optimizer as one rank writes it for all, tensor by tensor, and as any number of ranks read it.

The files are those that `kept.write_optimizer` leaves, in which every rank writes a part: either is read by both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from whet.backends.kept import FOLDER, require_spread
from whet.errors import CheckpointError, ModelError
from whet.weights.stored import Entry
from whet.weights.torch_dist import Reader, described, write_tensors

REMEDY = "resume with the model, adapter and freezing that the checkpoint was written with"


def write_moments(moments: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write what is yielded, on rank 0, while every other rank runs through it; nothing where that is nothing."""
    try:
        if dist.get_rank() == 0:
            (folder / FOLDER).mkdir()
            if not write_tensors(moments, folder / FOLDER):
                (folder / FOLDER).rmdir()
    finally:
        for _ in moments:  # whatever happened: the ranks gather them together
            pass


class Moments:
    """What was written, read one tensor at a time; `steps` is how often the optimizer had stepped.

    Raises CheckpointError where it is of other weights than those of these shapes, by name.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.folder = folder / FOLDER
        self.steps = 0
        self._entries: dict[str, Entry] = {}
        require_spread(folder)
        if not self.folder.is_dir():  # no step had been made
            return
        try:
            self._reader = Reader(self.folder)
            self._reader.set_up_storage_reader(self._reader.read_metadata(), is_coordinator=True)
            self._entries = described(self._reader.metadata)
        except (ModelError, OSError) as error:
            raise self._unreadable(error) from error
        self._check(shapes)
        steps = [name for name in self._entries if name.endswith(".step")]
        self.steps = int(max((float(self.read(name)) for name in steps), default=0.0))

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        if name not in self._entries:
            raise CheckpointError(f"{self.folder} has no {name}; {REMEDY}")
        try:
            return self._reader.tensor(name, self._entries[name])
        except ModelError as error:
            raise self._unreadable(error) from error

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        saved = {name.rpartition(".")[0]: entry.shape for name, entry in self._entries.items() if entry.shape}
        if saved != dict(shapes):
            name = next(name for name in sorted({*saved, *shapes}) if saved.get(name) != shapes.get(name))
            raise CheckpointError(
                f"{self.folder} has {name} {saved.get(name, 'not at all')}, and the model {shapes.get(name, 'not')}; "
                f"{REMEDY}"
            )

    def _unreadable(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.folder} cannot be read ({error}); resume from another checkpoint")
