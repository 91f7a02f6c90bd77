"""Arrays on disk: whole or absent, checked when read, safe with several writers."""

from __future__ import annotations

import os
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


def entry(root: Path, name: str, *, used: int, kilobytes: int = 100) -> Path:
    """An entry of that size, last used so many seconds after the epoch."""
    folder = root / f"{name}-{used:032x}"
    cache.store(folder, {"tokens": np.zeros(kilobytes * 1000, dtype=np.uint8)}, {})
    os.utime(folder / "index.json", (used, used))
    return folder


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path):
    old, middle, new = (entry(tmp_path, "sft", used=second) for second in (1, 2, 3))
    cache.trim(tmp_path, 250e-6, keep=new)  # 300 kB are there
    assert [folder.exists() for folder in (old, middle, new)] == [False, True, True]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    cache.trim(tmp_path, 250e-6, keep=new)
    assert middle.exists()


def test_what_is_loaded_counts_as_used(tmp_path: Path):
    old, middle, new = (entry(tmp_path, "preference", used=second) for second in (1, 2, 3))
    assert cache.load(old) is not None
    cache.trim(tmp_path, 250e-6, keep=new)
    assert [folder.exists() for folder in (old, middle, new)] == [True, False, True]


def test_the_entry_just_written_stays_however_large(tmp_path: Path):
    old, new = entry(tmp_path, "sft", used=1), entry(tmp_path, "annotated", used=2, kilobytes=900)
    cache.trim(tmp_path, 500e-6, keep=new)
    assert (old.exists(), new.exists()) == (False, True)


def test_only_entries_are_removed(tmp_path: Path):
    others = [tmp_path / "thesis", tmp_path / "sft-notes", tmp_path / f"sft-{'a' * 32}"]
    for folder in others:
        folder.mkdir()
        (folder / "data.npy").write_bytes(bytes(300_000))
    (others[0] / "index.json").write_text("{}")
    (others[1] / "index.json").write_text("{}")
    new = entry(tmp_path, "sft", used=1)
    cache.trim(tmp_path, 1e-6, keep=new)
    assert all(folder.exists() for folder in others)


def test_drafts_of_killed_processes_are_removed_after_a_day(tmp_path: Path):
    new = entry(tmp_path, "sft", used=1)
    names = [f".sft-{'b' * 32}.12.{age:08x}.tmp" for age in (1, 2)] + [".mine.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    for name in names[1:]:
        os.utime(tmp_path / name, (1, 1))
    cache.trim(tmp_path, 1, keep=new)
    assert [(tmp_path / name).exists() for name in names] == [True, False, True]


def test_who_has_loaded_an_entry_keeps_it_when_it_is_removed(tmp_path: Path):
    old, new = entry(tmp_path, "sft", used=1), entry(tmp_path, "sft", used=2)
    found = cache.load(old)
    os.utime(old / "index.json", (1, 1))
    cache.trim(tmp_path, 150e-6, keep=new)
    assert not old.exists() and found is not None
    assert int(found[0]["tokens"].sum()) == 0 and len(found[0]["tokens"]) == 100_000


def test_processes_that_trim_at_once_do_not_disturb_each_other(tmp_path: Path):
    code = f"""
import numpy as np, sys
from pathlib import Path
from whet.data import cache
root = Path({str(tmp_path)!r})
for i in range(60):
    folder = root / f"sft-{{(i * 7 + int(sys.argv[1])) % 20:032x}}"
    found = cache.load(folder)
    if found is None:
        cache.store(folder, {{"tokens": np.full(10_000, i, dtype=np.uint8)}}, {{}})
        cache.trim(root, 55e-6, keep=folder)
    else:
        assert len(found[0]["tokens"]) == 10_000
"""
    source = Path(cache.__file__).parents[2]
    workers = [subprocess.Popen([sys.executable, "-c", code, str(n)], cwd=source) for n in (0, 3)]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
    names = [path.name for path in tmp_path.iterdir()]
    assert 1 <= len(names) <= 6 and not any(name.startswith(".") for name in names)
