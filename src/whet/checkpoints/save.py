"""Checkpoint folders that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from whet.errors import CheckpointError

MARKER = "complete.json"
FOLDER = re.compile(r"checkpoint-(\d+)")
# A folder on its way in or out (tmp), and one that makes room for its successor (old).
HIDDEN = re.compile(r"\.(checkpoint-\d+|final)\.(tmp|old)-(\d+)")
CHUNK_BYTES = 1 << 22
FULL = (errno.ENOSPC, errno.EDQUOT)

_in_flight: set[Path] = set()


def write(root: str | Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Make `root/checkpoint-<step>` of what `fill` writes into the empty folder it is given.

    Everything is on the disk, with a marker that holds the size and checksum of every file, before the
    folder takes its name; a checkpoint of that name is replaced in the same way. Returns the folder.
    Raises CheckpointError when it cannot be written; older checkpoints are then as they were.
    """
    root = Path(root)
    draft, retired = (root.absolute() / f".checkpoint-{step}.{kind}-{os.getpid()}" for kind in ("tmp", "old"))
    final = root / f"checkpoint-{step}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        recover(root)
        remove_leftovers(root)
        _in_flight.update((draft, retired))
        draft.mkdir()
        fill(draft)
        _seal(draft, step)
        if final.exists():
            final.rename(retired)
        draft.rename(final)
        _sync(root)
    except Exception as error:
        if _is_about_the_disk(error):
            raise CheckpointError(_explain(root, f"checkpoint {step}", error)) from error
        raise
    finally:
        _in_flight.difference_update((draft, retired))
        if root.is_dir():
            recover(root)
            remove_leftovers(root)
    return final


def publish(root: str | Path, fill: Callable[[Path], None]) -> None:
    """Put what `fill` writes into the empty folder it is given into `root` itself, each file whole or as it was.

    Weights of an earlier model that the new one has not are removed from each folder that is written to.
    Raises CheckpointError when the files cannot be written; what was there is then as it was.
    """
    root = Path(root)
    draft = root.absolute() / f".final.tmp-{os.getpid()}"
    try:
        remove_leftovers(root)
        draft.mkdir()
        fill(draft)
        files = sorted(path for path in draft.rglob("*") if path.is_file())
        for path in files:
            _sync(path)
        written = {root / path.relative_to(draft): path for path in files}
        folders = sorted({path.parent for path in written})
        for folder in folders:
            folder.mkdir(exist_ok=True, parents=True)
        for final, path in written.items():
            path.replace(final)
        for folder in folders:
            for path in folder.glob("model*.safetensors*"):
                if path not in written:
                    path.unlink()
            _sync(folder)
        _sync(root)
    except Exception as error:
        if _is_about_the_disk(error):
            raise CheckpointError(_explain(root, "the final model", error)) from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def create(folder: str | Path, fill: Callable[[Path], None]) -> None:
    """Make a new folder of what `fill` writes into the empty folder it is given: whole, or not at all.

    Raises CheckpointError when it cannot be written.
    """
    folder = Path(folder).absolute()
    draft = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.tmp-*"):
            if not _alive(int(left.name.rpartition("-")[2])):
                shutil.rmtree(left)
        draft.mkdir()
        fill(draft)
        for path in [*draft.rglob("*"), draft]:
            _sync(path)
        draft.rename(folder)
        _sync(folder.parent)
    except Exception as error:
        if _is_about_the_disk(error):
            said = " ".join(str(error).split())
            full = _is_full(error)
            free = f"free some space ({shutil.disk_usage(_present(folder)).free / 2**20:.0f} MiB left)"
            remedy = free if full else "make it writable, or name another folder"
            raise CheckpointError(f"{folder} could not be written: {said}; {remedy}. Nothing is left there") from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def prune(root: str | Path, keep: int | None, protect: Iterable[Path] = ()) -> list[Path]:
    """Remove all complete checkpoints but the newest `keep` and those in `protect`. Returns those removed.

    With `keep` None nothing is removed. Folders without a marker are not ours to remove. Raises
    CheckpointError if one cannot be removed.
    """
    if keep is None:
        return []
    protected = {path.resolve() for path in protect}
    complete = [folder for folder in checkpoints(root) if (folder / MARKER).is_file()]
    removed = [folder for folder in complete[: max(len(complete) - keep, 0)] if folder.resolve() not in protected]
    for folder in removed:
        # Half of a removed checkpoint must not carry its name.
        hidden = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
        try:
            folder.rename(hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be removed: {error}; make {folder.parent} writable") from error
    return removed


def checkpoints(root: str | Path) -> list[Path]:
    """The folders `checkpoint-N` below root, complete or not, by rising N."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = [(FOLDER.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def recover(root: Path) -> None:
    """Put back a checkpoint whose writer died after moving it away and before its successor took its place."""
    for path, name, kind in _abandoned(root):
        if kind == "old" and not (root / name).exists():
            path.rename(root / name)


def remove_leftovers(root: Path) -> None:
    """Remove what writers that are dead left half done."""
    for path, _, _ in _abandoned(root):
        shutil.rmtree(path, ignore_errors=True)


def checksum(path: Path) -> str:
    """BLAKE2b of a file, 128 bits, as hex."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _abandoned(root: Path) -> list[tuple[Path, str, str]]:
    found = [(path, HIDDEN.fullmatch(path.name)) for path in root.iterdir()]
    hidden = [(path, match) for path, match in found if match and path.absolute() not in _in_flight]
    return [(path, match[1], match[2]) for path, match in hidden if not _alive(int(match[3]))]


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return (
            False  # Not in flight: left by a process of an earlier life, as in a container that always gives one pid.
        )
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _seal(folder: Path, step: int) -> None:
    """Bring every file to the disk, then write down what a complete folder looks like."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "blake2b": checksum(path)} for path in files
    }
    marker = folder / MARKER
    marker.write_text(json.dumps({"step": step, "files": listed}, indent=1) + "\n", encoding="utf-8")
    for path in [*files, marker, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_about_the_disk(error: Exception) -> bool:
    # safetensors reports the operating system's errors in words only.
    return isinstance(error, OSError) or "os error" in str(error)


def _is_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in FULL or any(f"os error {number}" in str(error) for number in FULL)


def _present(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _explain(root: Path, what: str, error: Exception) -> str:
    said = " ".join(str(error).split())
    if _is_full(error):
        free = shutil.disk_usage(root).free / 2**20
        remedy = f"free some space ({free:.0f} MiB left) or keep fewer checkpoints (checkpoint.keep)"
    else:
        remedy = "make the folder writable, or set output_dir to another"
    return f"{what} could not be written to {root}: {said}; {remedy}. Earlier checkpoints are unharmed"
