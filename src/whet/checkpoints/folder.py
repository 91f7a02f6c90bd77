"""The folder of a run: it can be written to, and one run at a time does so."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whet.errors import CheckpointError


def check_folder(root: str | Path) -> None:
    """Raises CheckpointError where a run could not leave its files, or another run is leaving its own.

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
    if root.is_dir():
        os.close(_lock(root))


@contextmanager
def claimed(root: str | Path) -> Iterator[Path]:
    """The folder, made if need be, for as long as this run writes to it; a process that dies lets go of it.

    Raises CheckpointError where it cannot be made, or while another run has it.
    """
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"output_dir {root} cannot be made: {error}; set it to another folder") from error
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
