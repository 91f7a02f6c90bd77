"""The folder of a run: it can be written to, and one run at a time does so."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whet.checkpoints.disk import writing
from whet.config.model import ModelConfig
from whet.errors import CheckpointError
from whet.models.source import ADAPTER_CONFIG, adapter_base

RUN_FILE = "run.yaml"
"""The resolved configuration, in the folder of every run."""


def check_folder(root: str | Path, model: ModelConfig) -> None:
    """Raises CheckpointError where a run could not leave its files, or would spoil what is there.

    Makes nothing: a run that is refused for another reason leaves no trace.
    """
    root = Path(root)
    present = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    if not present.is_dir():
        raise CheckpointError(f"output_dir is {str(root)!r}, but {present} is a file; set output_dir to another folder")
    if not os.access(present, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"output_dir is {str(root)!r}, but {present} is not writable; make it writable, or set output_dir to "
            "another folder"
        )
    _check_model_in(root, model)
    if root.is_dir():
        os.close(_lock(root))


def _check_model_in(root: Path, model: ModelConfig) -> None:
    """The final model must replace neither the one that the run begins with, nor one of another kind or origin."""
    if root.resolve() == Path(model.path).expanduser().resolve():
        raise CheckpointError(
            f"output_dir is {str(root)!r}, the folder of model.path: the final model would be written over what the "
            "run began with; set output_dir to another folder"
        )
    left = [name for name in ("config.json", ADAPTER_CONFIG) if (root / name).is_file()]
    if left and not (root / RUN_FILE).is_file():
        raise CheckpointError(f"output_dir {root} holds a model that no run left there; set it to another folder")
    is_adapter = model.adapter is not None or adapter_base(model) is not None
    ours = ADAPTER_CONFIG if is_adapter else "config.json"
    if left and left != [ours]:
        raise CheckpointError(
            f"output_dir {root} holds {left[0]} of an earlier run, and this one would put {ours} beside it, a mix of "
            "two models; set output_dir to another folder, or empty it"
        )


@contextmanager
def claimed(root: str | Path) -> Iterator[Path]:
    """The folder, made if need be, for as long as this run writes to it; a process that dies lets go of it.

    Raises CheckpointError where it cannot be made, or while another run has it.
    """
    root = Path(root)
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(root)
    try:
        yield root
    finally:
        os.close(descriptor)


def _lock(root: Path) -> int:
    """A descriptor that holds the lock on a folder until it is closed."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(descriptor)
            raise CheckpointError(
                f"another run is training in {root}; wait for its end or stop it, or set output_dir to another folder"
            ) from None
        # A file system without locks: then nothing keeps two runs apart.
    return descriptor
