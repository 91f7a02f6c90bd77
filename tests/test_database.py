"""What is written to a database is there whole or not at all, and what went wrong is told."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from whet.database import Database
from whet.errors import CheckpointError

TABLE = "CREATE TABLE IF NOT EXISTS numbers (number INTEGER PRIMARY KEY, content BLOB);"


def test_a_full_disk_is_told_as_such_and_leaves_nothing_behind(tmp_path: Path):
    database = Database(tmp_path / "numbers.sqlite", TABLE, remedy="make room")
    database.rows("PRAGMA max_page_count = 4")
    with pytest.raises(CheckpointError, match="is full; make room"), database.transaction() as do:
        do.execute("INSERT INTO numbers VALUES (1, NULL)")
        do.execute("INSERT INTO numbers VALUES (2, ?)", (b"x" * 100_000,))
    assert database.rows("SELECT number FROM numbers") == []


def test_a_file_that_another_process_holds_is_told_as_such(tmp_path: Path):
    path = tmp_path / "numbers.sqlite"
    database = Database(path, TABLE, remedy="make room")
    database.rows("PRAGMA busy_timeout = 1")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(CheckpointError, match="is locked; another process holds it"), database.transaction():
        pass
    holder.close()


def test_what_raises_within_a_transaction_undoes_it(tmp_path: Path):
    database = Database(None, TABLE, remedy="make room")
    with pytest.raises(ZeroDivisionError), database.transaction() as do:
        do.execute("INSERT INTO numbers VALUES (1, NULL)")
        raise ZeroDivisionError
    assert database.rows("SELECT number FROM numbers") == []
