"""Arrays kept on disk under a key: written whole or not at all, checked when read, mapped into memory."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from whet.errors import DataError

_INDEX = "index.json"
_NAMES = re.compile(r"[a-z][a-z_-]*-[0-9a-f]{32}")
"""Folders that may be removed to make room. Whatever else lies beside them is not ours."""
_DRAFTS = re.compile(r"\.[a-z][a-z_-]*-[0-9a-f]{32}\.\d+\.[0-9a-f]{8}\.tmp")
_ABANDONED_S = 24 * 3600


def default_folder() -> Path:
    """`whet` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whet"


def root_of(cache_dir: str | None) -> Path:
    """The folder that holds the entries: what `data.cache_dir` names, or the default."""
    return Path(cache_dir).expanduser() if cache_dir else default_folder()


def load(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays and the notes that `store` put in `folder`; None when they are not there or damaged."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in index["checksums"]}
        if checksums(arrays) == index["checksums"]:
            with suppress(OSError):  # not ours to mark as used, which does not keep it from being used
                os.utime(folder / _INDEX)
            return arrays, index["notes"]
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        pass
    return None


def store(folder: Path, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
    """Write arrays and notes to `folder` in one stroke, in place of what is there.

    Safe with several processes at a time: each writes to a folder of its own and renames it. Raises
    DataError where nothing can be written.
    """
    draft = draft_beside(folder)
    try:
        draft.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(draft / f"{name}.npy", array, allow_pickle=False)
        index = {"checksums": checksums(arrays), "notes": dict(notes)}
        (draft / _INDEX).write_text(json.dumps(index), encoding="utf-8")
        if load(folder) is None:
            # A folder cannot be renamed onto one that holds something: what is there, damaged, goes first.
            with suppress(FileNotFoundError):
                folder.rename(draft / "damaged")
            _rename(draft, folder)
            shutil.rmtree(folder / "damaged", ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"tokenised data cannot be kept in {folder.parent}: {error}; set data.cache_dir to a folder with space"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _rename(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        # Another process may have been first; what it wrote under this key is the same.
        if load(folder) is None:
            raise


def trim(root: Path, max_gb: float, *, keep: Path) -> None:
    """Remove the entries of `root` that were not loaded for longest, until the rest has at most `max_gb` gigabytes.

    `keep` stays, however large. Only folders with a name and content such as `store` writes are touched, and what
    killed processes left behind a day ago. Safe beside other processes: an entry disappears in one stroke, and
    who has loaded it keeps what is mapped.
    """
    entries = sorted(_entries(root), key=lambda entry: entry[1])
    excess = sum(size for _, _, size in entries) - max_gb * 1e9
    for folder, _, size in entries:
        if excess <= 0:
            break
        if folder != keep:
            excess -= size
            _remove(folder)
    for draft in root.glob(".*.tmp"):
        with suppress(OSError):
            if _DRAFTS.fullmatch(draft.name) and time.time() - draft.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(draft, ignore_errors=True)


def _entries(root: Path) -> Iterator[tuple[Path, float, int]]:
    """Folder, time of last use and bytes of each entry."""
    for folder in root.iterdir():
        if not _NAMES.fullmatch(folder.name):
            continue
        with suppress(OSError):  # another process may be removing it
            used = (folder / _INDEX).stat().st_mtime
            yield folder, used, sum(file.stat().st_size for file in folder.iterdir())


def _remove(folder: Path) -> None:
    doomed = draft_beside(folder)
    with suppress(OSError):
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def draft_beside(folder: Path) -> Path:
    """A name beside `folder` that no other process uses; `trim` removes it where its process was killed."""
    return folder.parent / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """A checksum of each array's values."""
    return {name: zlib.crc32(np.ascontiguousarray(array).view(np.uint8)) for name, array in arrays.items()}
