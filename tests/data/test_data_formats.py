"""Readers of the kinds of file, and what they say of broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from whet.data.formats import READERS
from whet.data.problems import Problems
from whet.errors import DataError

ROWS = [{"a": "eins", "b": "1"}, {"a": 'zwei, "2"\nZeilen', "b": ""}, {"a": "三 🐫", "b": "3"}]


def read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    problems = Problems()
    rows = list(READERS[path.suffix](path, problems))
    problems.raise_any()
    return rows


def write(path: Path, kind: str) -> list[int]:
    """Writes ROWS in one of the formats; returns the numbers its rows should have."""
    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
        return [1, 3, 5]
    if kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "json under data":
        path.write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    elif kind == "csv":
        path.write_text('a,b\neins,1\n"zwei, ""2""\nZeilen",\n三 🐫,3\n', encoding="utf-8", newline="")
        return [2, 3, 5]
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return [0, 1, 2]


@pytest.mark.parametrize("kind", ["jsonl", "json", "json under data", "csv", "parquet"])
def test_every_format_gives_the_same_rows_with_their_numbers(tmp_path: Path, kind: str):
    path = tmp_path / f"rows.{kind.split()[0]}"
    numbers = write(path, kind)
    assert read(path) == list(zip(numbers, ROWS, strict=True))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_changes_nothing(tmp_path: Path, kind: str):
    path = tmp_path / f"rows.{kind}"
    write(path, kind)
    before = read(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == before


def test_a_parquet_file_keeps_lists_and_objects(tmp_path: Path):
    row = {"messages": [{"role": "user", "content": "hi"}], "label": 0}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [(0, row)]


BROKEN = {
    "a broken line": (
        "a.jsonl",
        b'{"a": 1}\n{"a": "x" "b"}\n',
        r"a\.jsonl:2: broken JSON at column 11: .* near '.*\"b\"",
    ),
    "a cut-off line": ("a.jsonl", b'{"a": 1}\n{"a": "x', r"a\.jsonl:2: broken JSON at column 7: Unterminated string"),
    "a line that is a list": (
        "a.jsonl",
        b"[1, 2]\n",
        r"a\.jsonl:1: the line is a list \(\[1, 2\]\); expected an object",
    ),
    "bytes in a line": (
        "a.jsonl",
        b'{}\n{"a": "\xff"}\n',
        r"a\.jsonl:2: byte 8 of the line \(0xff\) is not UTF-8; save",
    ),
    "a broken list": (
        "a.json",
        b'[{"a": 1},\n {"a": }]',
        r"a\.json:2: broken JSON at column 8: .* near '.*}]'; correct",
    ),
    "lines in a .json": (
        "a.json",
        b'{"a": 1}\n{"a": 2}\n',
        r"a\.json:2: .*one object per line\? then name the file \.jsonl",
    ),
    "an object without data": ("a.json", b'{"rows": []}', r"an object with the keys rows; expected a list of rows"),
    "an element that is text": ("a.json", b'[{}, "x"]', r"a\.json\[1\] is text \('x'\); expected an object"),
    "bytes in a list": ("a.json", b'[\n"\xe4"]', r"a\.json:2: byte 2 of the line \(0xe4\) is not UTF-8"),
    "a row with too many fields": (
        "a.csv",
        b"a,b\n1,2\n1,2,3\n",
        r"a\.csv:3: the row has 3 fields, the header 2; quote",
    ),
    "an open quote": ("a.csv", b'a,b\n1,2\n"1,2\n', r"a\.csv:3: unexpected end of data; check the quotes"),
    "a column named twice": ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv:1: the header names 'a' more than once; rename one"),
    "bytes in a field": ("a.csv", b"a,b\n1,2\n1,\xc3\n", r"a\.csv:3: byte 3 of the line \(0xc3\) is not UTF-8"),
    "a table that is none": ("a.parquet", b"not a table", r"a\.parquet cannot be read as Parquet: .*; write it anew"),
}


@pytest.mark.parametrize("name,content,message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_an_error_that_names_place_and_remedy(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_all_broken_lines_are_reported_the_first_ten_in_full(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{\n" * 9 + "[]\n" * 4 + "{}\n")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.jsonl")
    lines = str(caught.value).splitlines()
    assert lines[0] == "13 rows cannot be used (9 broken JSON, 4 not an object):"
    assert [line.split(": ")[0].rpartition(":")[2] for line in lines[1:11]] == [str(n) for n in range(1, 11)]
    assert lines[11:] == ["  ... and 3 more"]
