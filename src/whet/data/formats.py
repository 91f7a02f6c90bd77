"""Readers of JSONL, JSON, CSV and Parquet files: each yields (line or index, row)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from whet.data.problems import Problems
from whet.errors import DataError

Rows = Iterator[tuple[int, dict[str, Any]]]

_BOM = b"\xef\xbb\xbf"
_EXCERPT = 24
_MAX_FIELD = 2**31 - 1


def describe(value: Any) -> str:
    """A value as an error message shows it: its kind in the words of JSON, and a short form of it."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    shown = repr(value)
    return f"{names.get(type(value), type(value).__name__)} ({shown if len(shown) <= 60 else shown[:57] + '...'})"


def read_jsonl(path: Path, problems: Problems) -> Rows:
    """One JSON object per line; blank lines are skipped. Lines are numbered from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                values = json.loads(line.decode("utf-8").rstrip("\r\n"))  # an error at the end is one of this line
            except UnicodeDecodeError as error:
                problems.add("undecodable", f"{place}: {_undecodable(line, error)}")
            except json.JSONDecodeError as error:
                problems.add("broken JSON", f"{place}: {_broken(error)}")
            else:
                if isinstance(values, dict):
                    yield number, values
                else:
                    problems.add("not an object", f"{place}: the line is {describe(values)}; expected an object")


def read_json(path: Path, problems: Problems) -> Rows:
    """A list of objects, or an object with such a list under `data`. Rows are numbered from 0."""
    text = _decode(path)
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object per line? then name the file .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: {_broken(error)}{hint}") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        found = f"an object with the keys {', '.join(content)}" if isinstance(content, dict) else describe(content)
        raise DataError(f"{path} holds {found}; expected a list of rows, or an object with such a list under 'data'")
    for number, values in enumerate(rows):
        if isinstance(values, dict):
            yield number, values
        else:
            problems.add("not an object", f"{path}[{number}] is {describe(values)}; expected an object")


def read_csv(path: Path, problems: Problems) -> Rows:
    """Comma-separated text with a header; quoted fields may hold commas, quotes and newlines.

    Every value is text. A row is numbered by the line on which it starts, from 1.
    """
    csv.field_size_limit(_MAX_FIELD)
    reader = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            place, number, start = f"{path}:{start}", start, reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = _header(path, fields)
            elif len(fields) == len(header):
                yield number, dict(zip(header, fields, strict=True))
            else:
                text = f"{place}: the row has {len(fields)} fields, the header {len(header)}; quote fields with commas"
                problems.add("wrong number of fields", text)
    except csv.Error as error:
        raise DataError(f"{path}:{start}: {error}; check the quotes of the row that starts here") from error


def read_parquet(path: Path, problems: Problems) -> Rows:
    """A Parquet table. Rows are numbered from 0."""
    del problems  # a table that opens has no broken rows
    if path.stat().st_size == 0:
        return
    try:
        with pq.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield number, values
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}; write it anew") from error


def _header(path: Path, fields: list[str]) -> list[str]:
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: the header names {', '.join(map(repr, twice))} more than once; rename one")
    return fields


def _decode(path: Path) -> str:
    content = path.read_bytes().removeprefix(_BOM)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line_start = content.rfind(b"\n", 0, error.start) + 1
        error.start -= line_start
        line = content.count(b"\n", 0, line_start) + 1
        raise DataError(f"{path}:{line}: {_undecodable(content[line_start:], error)}") from error


def _undecodable(line: bytes, error: UnicodeDecodeError) -> str:
    byte = f"0x{line[error.start]:02x}"
    return f"byte {error.start + 1} of the line ({byte}) is not UTF-8; save the file in UTF-8"


def _broken(error: json.JSONDecodeError) -> str:
    """Column (from 1) and surroundings of a JSON error."""
    line = error.doc.split("\n")[error.lineno - 1]
    at = error.colno - 1
    excerpt = line[max(0, at - _EXCERPT) : at + _EXCERPT].strip()
    return f"broken JSON at column {error.colno}: {error.msg} near {excerpt!r}; correct the line or remove it"


READERS: dict[str, Callable[[Path, Problems], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
"""Kind of file, by extension -> its reader."""
