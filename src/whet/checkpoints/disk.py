"""What the disk refuses, said with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whet.errors import CheckpointError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the operating system says when a file of a run cannot be written, as CheckpointError with the remedy."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}; make room or make it writable, or set output_dir to another folder"
        ) from error
