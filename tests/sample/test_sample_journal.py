"""The journal holds whole groups, gives them back as they were, and refuses to mix what was made otherwise."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from whet.errors import CheckpointError
from whet.sample.journal import Completed, Journal

MADE_WITH = {"seed": "0", "rollout.temperature": "1.0"}
GROUP = [
    Completed(0, "ä\u2028\n\x00", 0.1 + 0.2, "completed", 4, {"math": 1.0}),
    Completed(1, "", None, "failed", 0, error="it broke"),
]


def test_groups_come_back_as_they_were_in_the_order_of_prompts(tmp_path: Path):
    with Journal(tmp_path / "j", MADE_WITH) as journal:
        journal.write(2, "train/2", GROUP)
        journal.write(0, "train/0", GROUP[1:])
    with Journal(tmp_path / "j", MADE_WITH) as journal:
        assert list(journal.groups()) == [(0, GROUP[1:]), (2, GROUP)]
        assert len(journal) == 2 and 2 in journal and 1 not in journal
        assert [journal.num_scored(position) for position in range(3)] == [0, 0, 1]


def test_a_write_is_on_the_disk_before_it_returns(tmp_path: Path):
    journal = Journal(tmp_path / "j", MADE_WITH)
    journal.write(0, "train/0", GROUP)
    with sqlite3.connect(tmp_path / "j") as other:  # while the first is still open, as after a kill
        assert other.execute("SELECT prompt, scored FROM groups").fetchall() == [("train/0", 1)]
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
    journal.close()


def test_what_was_made_otherwise_is_refused_setting_by_setting(tmp_path: Path):
    Journal(tmp_path / "j", MADE_WITH).close()
    with pytest.raises(CheckpointError) as refusal:
        Journal(tmp_path / "j", {"seed": "0", "rollout.temperature": "0.7", "rollout.top_k": "5"})
    said = str(refusal.value)
    assert "rollout.temperature was 1.0 and is 0.7" in said and "rollout.top_k was not there and is 5" in said
    assert "seed" not in said and "output_dir" in said
    Journal(tmp_path / "j", MADE_WITH).close()  # nothing was changed by the refusal


def test_a_file_that_is_no_journal_is_told(tmp_path: Path):
    (tmp_path / "j").write_bytes(b"something else altogether" * 100)
    with pytest.raises(CheckpointError, match=r"not a database.*move it away"):
        Journal(tmp_path / "j", MADE_WITH)
