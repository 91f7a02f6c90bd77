"""Which checkpoint a run goes on from, and whether it is whole."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from whet.checkpoints.save import MARKER, checkpoints, checksum, recover
from whet.errors import CheckpointError

logger = logging.getLogger(__name__)


def newest(root: str | Path) -> Path | None:
    """The complete checkpoint below root with the highest step, None if there is none.

    Damaged ones above it are named in a warning.
    """
    root = Path(root)
    if root.is_dir():
        recover(root)
    for folder in reversed(checkpoints(root)):
        problem = _problem(folder)
        if problem is None:
            return folder
        logger.warning("%s is passed over: %s", folder, problem)
    return None


def verify(folder: str | Path) -> int:
    """The step of a checkpoint, all of whose files are as they were written. Raises CheckpointError."""
    folder = Path(folder)
    problem = _problem(folder)
    if problem is not None:
        raise CheckpointError(f"{folder} cannot be resumed from: {problem}; choose another checkpoint")
    return _marker(folder)["step"]


def choose(resume: str | bool, root: str | Path) -> Path | None:
    """The checkpoint to go on from as `checkpoint.resume` asks, None to start afresh.

    `auto` takes the newest complete one in `root` if there is any, true insists on one, false refuses
    a `root` that has one, and a path names one. Raises CheckpointError.
    """
    root = Path(root)
    if resume is False:
        if present := checkpoints(root):
            raise CheckpointError(
                f"checkpoint.resume is false, but {root} has {present[-1].name}; "
                f"set output_dir to a new folder, remove the checkpoints, or set checkpoint.resume: true"
            )
        return None
    if resume is True or resume == "auto":
        return _newest_or_error(root, insist=resume is True)
    folder = Path(resume).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint.resume is {resume!r}, but there is no folder {folder.absolute()}{_near(root)}"
        )
    if not (folder / MARKER).is_file() and (inside := checkpoints(folder)):
        raise CheckpointError(
            f"checkpoint.resume is {resume!r}, which holds checkpoints but is none; give {inside[-1]}, for example"
        )
    verify(folder)
    return folder


def _newest_or_error(root: Path, *, insist: bool) -> Path | None:
    found = newest(root)
    present = checkpoints(root)
    if found is None and present:
        raise CheckpointError(
            f"{root} has {', '.join(folder.name for folder in present)}, none of which is complete "
            f"({present[-1].name}: {_problem(present[-1])}); remove them to start afresh, or set a new output_dir"
        )
    if found is None and insist:
        raise CheckpointError(
            f"checkpoint.resume is true, but {root.absolute()} has no checkpoint; "
            f"check output_dir, or set checkpoint.resume: auto to start afresh"
        )
    return found


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    try:
        files = _marker(folder)["files"]
    except FileNotFoundError:
        return f"it has no {MARKER}, so that it was not written to its end, or not by this program"
    except (ValueError, KeyError, OSError) as error:
        return f"its {MARKER} cannot be read ({error})"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
        if checksum(path) != expected["blake2b"]:
            return f"{name} was changed since it was written (its checksum differs)"
    return None


def _marker(folder: Path) -> dict:
    return json.loads((folder / MARKER).read_text(encoding="utf-8"))


def _near(root: Path) -> str:
    present = checkpoints(root)
    return f"; {root} has {', '.join(folder.name for folder in present[-3:])}" if present else ""
