"""An SQLite file that outlives its writer: each write is there whole, or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from whet.errors import CheckpointError


class Database:
    """A file with the tables of `schema`; in memory where `path` is None.

    `survives` says what a write is safe from once it is done: the end of the `process`, or of the `machine`, which
    takes longer. `remedy` ends the message about a file that cannot be used.
    Raises CheckpointError whenever the file cannot be read or written.
    """

    def __init__(
        self, path: Path | None, schema: str, *, remedy: str, survives: Literal["process", "machine"] = "process"
    ) -> None:
        self.path, self._remedy = path, remedy
        with self._told():
            self._file = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
            try:
                # A reader never waits for the writer.
                self._file.execute("PRAGMA journal_mode=WAL")
                self._file.execute(f"PRAGMA synchronous={'FULL' if survives == 'machine' else 'NORMAL'}")
                self._file.executescript(schema)
            except BaseException:
                self._file.close()
                raise

    def rows(self, query: str, values: Sequence = ()) -> list[tuple]:
        """All rows of a query."""
        with self._told():
            return self._file.execute(query, values).fetchall()

    def each(self, query: str) -> Iterator[tuple]:
        """The rows of a query, one at a time."""
        with self._told():
            yield from self._file.execute(query)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Cursor]:
        """What is written within is there together when it ends, and not at all where it raises."""
        with self._told():
            cursor = self._file.cursor()
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
            except BaseException:
                if self._file.in_transaction:  # a full disk has rolled back already
                    cursor.execute("ROLLBACK")
                raise
            cursor.execute("COMMIT")

    def close(self) -> None:
        """Let go of the file; what was written is in it alone, without files beside it."""
        with self._told():
            self._file.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            where = self.path or "a journal in memory"
            locked = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
            remedy = "another process holds it: end that one, or wait for it" if locked else self._remedy
            raise CheckpointError(f"{where} cannot be read or written: {error}; {remedy}") from error
