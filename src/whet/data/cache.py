"""Arrays kept on disk under a key: written whole or not at all, checked when read, mapped into memory."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from whet.errors import DataError

_INDEX = "index.json"


def default_folder() -> Path:
    """`whet` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whet"


def load(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays and the notes that `store` put in `folder`; None when they are not there or damaged."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in index["checksums"]}
        if checksums(arrays) == index["checksums"]:
            return arrays, index["notes"]
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        pass
    return None


def store(folder: Path, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
    """Write arrays and notes to `folder` in one stroke, in place of what is there.

    Safe with several processes at a time: each writes to a folder of its own and renames it. Raises
    DataError where nothing can be written.
    """
    draft = folder.parent / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
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


def checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """A checksum of each array's values."""
    return {name: zlib.crc32(np.ascontiguousarray(array).view(np.uint8)) for name, array in arrays.items()}
