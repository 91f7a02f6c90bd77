"""Rows of data files, one by one, each with where it stands."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from whet.data.formats import READERS, describe
from whet.data.problems import Problems
from whet.errors import DataError

_SLICE = re.compile(r"(?P<path>.*)@\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\]")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")


@dataclass(frozen=True, slots=True)
class Source:
    """A file, or a data set on the hub (`owner/name`, `:config` and `:split` may follow), and the slice to take."""

    path: str
    start: int | None = None
    stop: int | None = None

    @property
    def extension(self) -> str:
        """`.jsonl` and so on; empty for a data set on the hub."""
        return Path(self.path).suffix.lower() if Path(self.path).is_file() else ""

    def place(self, number: int) -> str:
        """Where a row stands, as in `train.jsonl:17` (a line, from 1) or `train.json[16]` (an index, from 0)."""
        return f"{self.path}:{number}" if self.extension in (".jsonl", ".ndjson", ".csv") else f"{self.path}[{number}]"

    def digest(self) -> str:
        """A hash of the content and of the slice."""
        if self.extension:
            with Path(self.path).open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            content = _hub(self.path)._fingerprint
        return f"{self.extension}:{content}@{self.start}:{self.stop}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as the file has it. `number` is its line (JSONL, CSV) or its index (everything else)."""

    source: Source
    number: int
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return self.source.place(self.number)


def parse_sources(paths: str | Sequence[str]) -> tuple[Source, ...]:
    """The files that `data.train` or `data.eval` names.

    Raises DataError for a file that is not there, a kind of file that cannot be read, a broken slice,
    and for a name on the hub when the package `datasets` is not installed.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    if not paths:
        raise DataError("no data file is given; name one in data.train")
    return tuple(_parse(path) for path in paths)


def read_rows(source: Source, problems: Problems) -> Iterator[Row]:
    """The rows of one source, in order. A broken row is added to `problems` and left out.

    Raises DataError when the file holds no rows, or its slice selects none.
    """
    rows = (Row(source, number, values) for number, values in _read(source, problems))
    if (source.start or 0) < 0 or (source.stop or 0) < 0:
        rows = iter(list(rows)[source.start : source.stop])
    elif source.start is not None or source.stop is not None:
        rows = islice(rows, source.start, source.stop)
    num_problems, empty = len(problems), True
    for row in rows:
        empty = False
        yield row
    if empty and len(problems) == num_problems:
        if (source.start, source.stop) != (None, None):
            start, stop = ("" if end is None else end for end in (source.start, source.stop))
            raise DataError(f"{source.path} has no rows in its slice [{start}:{stop}]; widen it or leave it out")
        raise DataError(f"{source.path} is empty; expected at least one row")


def _parse(text: str) -> Source:
    path, start, stop = text, None, None
    if match := _SLICE.fullmatch(text):
        path = match["path"]
        start, stop = (int(match[end]) if match[end] else None for end in ("start", "stop"))
    elif "@[" in text:
        raise DataError(f"{text!r} has a broken slice; write it as in rows.jsonl@[0:1000]")
    expanded = Path(path).expanduser()
    if expanded.is_file():
        if expanded.suffix.lower() not in READERS:
            raise DataError(
                f"{path} is of an unknown kind {expanded.suffix or '(no extension)'!r}; "
                f"expected one of {', '.join(READERS)}; convert or rename it"
            )
        return Source(str(expanded), start, stop)
    if expanded.is_dir():
        files = sorted(entry.name for entry in expanded.iterdir() if entry.suffix.lower() in READERS)
        raise DataError(f"{path} is a folder; name a file in it ({', '.join(files[:10]) or 'it holds no data files'})")
    if expanded.suffix.lower() in READERS or path.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(path):
        raise _missing(path, expanded)
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"there is no file {path}; reading a data set of that name from the hub needs the package "
            f"'datasets': pip install datasets, or give a file"
        )
    return Source(path, start, stop)


def _missing(path: str, expanded: Path) -> DataError:
    """The error for a file that is not there, with the name in its folder that comes nearest."""
    folder = expanded.parent
    if not folder.is_dir():
        return DataError(f"there is no file {path}: the folder {folder} does not exist; check the path")
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    near = difflib.get_close_matches(expanded.name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"nothing in {folder} has a name like it; check the path"
    return DataError(f"there is no file {path}; {hint}")


def _read(source: Source, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    if source.extension:
        yield from READERS[source.extension](Path(source.path), problems)
        return
    for number, values in enumerate(_hub(source.path)):
        if isinstance(values, dict):
            yield number, values
        else:
            problems.add("not an object", f"{source.place(number)} is {describe(values)}; expected an object")


def _hub(name: str) -> Any:
    """A data set of the hub: `owner/name`, `owner/name:split` or `owner/name:config:split`; `train` by default."""
    import datasets  # an extra: only those who name a data set of the hub need it

    path, *rest = name.split(":")
    split = rest[-1] if rest else "train"
    try:
        return datasets.load_dataset(path, rest[0] if len(rest) == 2 else None, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"there is no file {name}, and the hub has no data set {path!r} with a split {split!r} that can be "
            f"read: {error}"
        ) from error
