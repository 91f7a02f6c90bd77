"""Rollouts on disk: what every step sampled and trained on, in a file of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from whet.errors import CheckpointError, DataError
from whet.rollout.group import Group
from whet.rollout.lines import TOLD, Line, lines_of
from whet.rollout.protocols import StateDict
from whet.types import Unit

FOLDER = "rollouts"
"""In the folder of a run."""
ABOUT_FILE = "run.json"
"""Beside the steps: what a replay needs to know of the run."""
Format = Literal["jsonl", "parquet"]
_STEP = re.compile(r"step-(\d+)\.(jsonl|parquet)")
_COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("group", "prompt_id", "response", "status", "error")),
        *((name, pa.int64()) for name in ("index", "num_prompt_tokens")),
        ("trained", pa.bool_()),
        ("reward", pa.float64()),
        *((name, pa.list_(pa.int64())) for name in ("tokens", "loss_mask")),
        ("sampler_logprobs", pa.list_(pa.float64())),
        *((name, pa.string()) for name in ("content", "label", "metadata", "rewards", "info", "versions")),
        *((name, pa.string()) for name in ("columns", "unit_columns")),
    ]
)
_AS_JSON = ("content", "label", "metadata", "rewards", "info", "versions", "columns", "unit_columns")
"""What has no fixed shape stands in Parquet as JSON."""


class Dump:
    """The folder of a run's rollouts: `step-<N>.jsonl` or `.parquet` for each step, and what a replay needs to know.

    Files appear whole or not at all; one that is there is replaced. With `keep`, only those of the newest steps stay.
    Raises CheckpointError where one cannot be written.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, Any], *, format: Format = "jsonl", keep: int | None = None
    ) -> None:
        self.folder, self._about, self._format, self._keep = folder, about, format, keep

    def write(self, step: int, lines: Sequence[Line]) -> Path:
        """Write the lines of one step; returns the file."""
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            about = self.folder / ABOUT_FILE
            if not about.is_file():
                _replace(about, json.dumps(self._about, indent=1).encode())
            path = self.folder / f"step-{step}.{self._format}"
            _replace(path, _as_parquet(lines) if self._format == "parquet" else _as_jsonl(lines))
            for other in step_files(self.folder).get(step, []):
                if other != path:
                    other.unlink()
            self._prune(step)
        return path

    def _prune(self, step: int) -> None:
        """Steps after this one are of an earlier run that is gone back behind."""
        for number, files in step_files(self.folder).items():
            if number > step or (self._keep is not None and number <= step - self._keep):
                for path in files:
                    path.unlink()


class DumpedSource:
    """A source of rollouts whose every step is written down as it is taken. What it is asked else goes to `source`."""

    def __init__(self, source: Any, dump: Dump) -> None:
        self._source: Any = source
        self._dump = dump
        self._step = 0

    async def take(self, n: int) -> list[Unit]:
        """The units of the source, once they are on the disk. Raises CheckpointError where they cannot be written."""
        units = await self._source.take(n)
        self._step += 1
        # In a thread, as sampling ahead does not wait for the disk.
        await asyncio.to_thread(self._write, units, self._source.rollout.groups)
        return units

    def _write(self, units: Sequence[Unit], groups: Sequence[Group]) -> None:
        self._dump.write(self._step, list(lines_of(units, groups)))

    async def publish(self, snapshot: Any) -> None:
        await self._source.publish(snapshot)

    def state_dict(self) -> StateDict:
        return {**self._source.state_dict(), "dumped": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state.get("dumped", 0)
        self._source.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def step_files(folder: Path) -> dict[int, list[Path]]:
    """The files of a folder by the step they are of."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if named := _STEP.fullmatch(path.name):
            found.setdefault(int(named[1]), []).append(path)
    return found


def read_lines(path: Path) -> list[Line]:
    """What `Dump.write` wrote, floats to the bit. Raises DataError naming file and line."""
    try:
        if path.suffix == ".parquet":
            return [_from_row(row) for row in pq.read_table(path).to_pylist()]
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; dump the rollout anew") from error
    lines = []
    for number, text in enumerate(content.removesuffix("\n").split("\n"), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise DataError(f"{path}:{number} is no line of a rollout: {error}; dump it anew") from error
    return lines


def _as_jsonl(lines: Sequence[Line]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines).encode()


def _as_parquet(lines: Sequence[Line]) -> bytes:
    rows = [{name: _in_cell(name, line.get(name)) for name in _COLUMNS.names} for line in lines]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_COLUMNS), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _in_cell(name: str, value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if name in _AS_JSON and value is not None else value


def _from_row(row: Line) -> Line:
    """A row as its line was, without what it did not have."""
    read = {name: json.loads(v) if name in _AS_JSON and v is not None else v for name, v in row.items()}
    return read if read["prompt_id"] is not None else {k: v for k, v in read.items() if k not in TOLD}


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is there whole or as it was before."""
    scratch = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the rollout cannot be written to {folder}: {error}; make room, lower log.keep_rollouts, or set "
            "log.rollouts to false"
        ) from error
