"""Arrays on disk: whole or absent, checked when read, safe with several writers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from whet.data import cache
from whet.errors import DataError

ARRAYS = {"tokens": np.arange(1000, dtype=np.int32), "mask": np.array([True, False] * 500)}
NOTES = {"dropped": 3}


def same(found: tuple | None) -> bool:
    return found is not None and found[1] == NOTES and all(np.array_equal(found[0][k], v) for k, v in ARRAYS.items())


def test_what_is_stored_is_loaded_mapped_from_disk(tmp_path: Path):
    cache.store(tmp_path / "deep" / "key", ARRAYS, NOTES)
    found = cache.load(tmp_path / "deep" / "key")
    assert found is not None and same(found)
    assert isinstance(found[0]["tokens"], np.memmap)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["key"]


def test_nothing_is_loaded_where_nothing_was_stored(tmp_path: Path):
    assert cache.load(tmp_path / "key") is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "tokens.npy"),
    "a cut-off array": lambda folder: (folder / "mask.npy").write_bytes((folder / "mask.npy").read_bytes()[:-7]),
    "an empty array": lambda folder: (folder / "mask.npy").write_bytes(b""),
    "another file": lambda folder: (folder / "mask.npy").write_bytes(b"not an array"),
    "a lost array": lambda folder: (folder / "tokens.npy").unlink(),
    "a lost index": lambda folder: (folder / "index.json").unlink(),
    "a broken index": lambda folder: (folder / "index.json").write_text('{"checksums": '),
    "an index of another kind": lambda folder: (folder / "index.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_not_loaded_and_can_be_written_anew(tmp_path: Path, damage):
    folder = tmp_path / "key"
    cache.store(folder, ARRAYS, NOTES)
    damage(folder)
    assert cache.load(folder) is None
    cache.store(folder, ARRAYS, NOTES)
    assert same(cache.load(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "mask.npy", "tokens.npy"]


def test_two_processes_that_write_at_once_leave_one_whole_entry(tmp_path: Path):
    code = f"""
import numpy as np, sys
from pathlib import Path
from whet.data import cache
arrays = {{"tokens": np.arange(1000, dtype=np.int32), "mask": np.array([True, False] * 500)}}
for i in range(40):
    folder = Path({str(tmp_path)!r}) / str(i)
    cache.store(folder, arrays, {{"dropped": 3}})
    assert cache.load(folder) is not None, i
"""
    source = Path(cache.__file__).parents[2]
    writers = [subprocess.Popen([sys.executable, "-c", code], cwd=source) for _ in range(2)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == list(range(40))
    assert all(same(cache.load(tmp_path / str(i))) for i in range(40))


def test_a_folder_that_cannot_be_written_names_the_setting(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be kept in .*file: .*; set data\.cache_dir"):
        cache.store(tmp_path / "file" / "key", ARRAYS, NOTES)


def test_the_default_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "whet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / ".cache" / "whet"
