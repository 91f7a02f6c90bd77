"""What tells whether the weights in a model's folder are still the files that were read."""

from __future__ import annotations

from pathlib import Path

Stamp = dict[str, tuple[int, int]]
"""Time of the last change in nanoseconds, and size in bytes, by file name."""


def stamp(folder: str | Path) -> Stamp:
    """The files of weights in a folder as they are now; none where it is no folder of this machine."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            told = path.stat()
        except OSError:  # it is being replaced
            found[path.name] = (0, 0)
        else:
            found[path.name] = (told.st_mtime_ns, told.st_size)
    return found
