"""Sources, slices and where a row stands."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from whet.data.problems import Problems
from whet.data.rows import Row, parse_sources, read_rows
from whet.errors import DataError


def rows_of(*paths: str) -> list[Row]:
    problems = Problems()
    rows = [row for source in parse_sources(list(paths)) for row in read_rows(source, problems)]
    problems.raise_any()
    return rows


@pytest.fixture
def ten(write_rows: Callable[..., str]) -> str:
    return write_rows(*({"n": n} for n in range(10)))


@pytest.mark.parametrize(
    "part,expected",
    [
        ("", range(10)),
        ("@[2:5]", [2, 3, 4]),
        ("@[:3]", [0, 1, 2]),
        ("@[8:]", [8, 9]),
        ("@[-2:]", [8, 9]),
        ("@[:-7]", [0, 1, 2]),
        ("@[7:99]", [7, 8, 9]),
    ],
)
def test_a_slice_selects_what_it_selects_of_a_list(ten: str, part: str, expected: list[int]):
    assert [row.values["n"] for row in rows_of(ten + part)] == list(expected)


def test_several_files_are_read_one_after_the_other(ten: str, write_rows: Callable[..., str]):
    other = write_rows({"n": 77}, name="other.jsonl")
    assert [row.values["n"] for row in rows_of(f"{ten}@[:2]", other)] == [0, 1, 77]


def test_a_row_of_a_slice_stands_at_its_own_line(ten: str):
    assert [row.place for row in rows_of(f"{ten}@[4:6]")] == [f"{ten}:5", f"{ten}:6"]


def test_a_file_at_whose_slice_nothing_is_left_is_an_error(ten: str):
    with pytest.raises(DataError, match=r"no rows in its slice \[50:60\]; widen it"):
        rows_of(f"{ten}@[50:60]")


@pytest.mark.parametrize("part", ["@[1:2:3]", "@[5]", "@[a:b]"])
def test_a_broken_slice_is_an_error_that_shows_a_right_one(ten: str, part: str):
    with pytest.raises(DataError, match=r"broken slice; write it as in rows\.jsonl@\[0:1000\]"):
        parse_sources(ten + part)


def test_a_missing_file_names_the_one_that_comes_nearest(ten: str):
    with pytest.raises(DataError, match=r"there is no file .*trian\.jsonl; did you mean train\.jsonl\?"):
        parse_sources(ten.replace("train", "trian"))


def test_a_missing_folder_is_told_as_such(tmp_path: Path):
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist"):
        parse_sources(str(tmp_path / "nowhere" / "train.jsonl"))


def test_a_folder_is_an_error_that_lists_its_files(ten: str):
    with pytest.raises(DataError, match=r"is a folder; name a file in it \(train\.jsonl\)"):
        parse_sources(str(Path(ten).parent))


def test_an_unknown_extension_lists_those_that_are_read(tmp_path: Path):
    (tmp_path / "train.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"unknown kind '\.xlsx'; expected one of \.jsonl, .*\.parquet"):
        parse_sources(str(tmp_path / "train.xlsx"))


def test_no_file_at_all_is_an_error():
    with pytest.raises(DataError, match=r"name one in data\.train"):
        parse_sources([])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"is empty; expected at least one row|cannot be read as Parquet"):
        rows_of(str(tmp_path / name))


def test_a_hub_name_without_the_package_names_the_package(monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name))
    with pytest.raises(DataError, match=r"no file someone/something; .* needs the package 'datasets': pip install"):
        parse_sources("someone/something")


def test_a_hub_name_may_carry_configuration_and_split(monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Hub(list):
        _fingerprint = "f00"

    def load_dataset(*args: str | None, **kwargs: str) -> Hub:
        asked.append((*args, kwargs["split"]))
        return Hub([{"a": 1}, {"a": 2}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __spec__=True))
    rows = rows_of("owner/name@[1:]", "owner/name:test", "owner/name:main:test")
    assert [row.place for row in rows[:2]] == ["owner/name[1]", "owner/name:test[0]"]
    assert asked == [("owner/name", None, "train"), ("owner/name", None, "test"), ("owner/name", "main", "test")]


def test_the_digest_follows_content_and_slice_but_not_the_name(ten: str, write_rows: Callable[..., str]):
    same = write_rows(*({"n": n} for n in range(10)), name="same.jsonl")
    other = write_rows(*({"n": n} for n in range(11)), name="other.jsonl")
    digests = [source.digest() for source in parse_sources([ten, same, other, f"{ten}@[0:5]"])]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
