"""The journal of a run's rollouts: every group from its prompt to the step that consumed it, in an SQLite file."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from whet.database import Database
from whet.errors import CheckpointError
from whet.rollout.group import BASELINE_INDEX, Group
from whet.types import Episode, Prompt, VersionSpan

FILE = "rollout.sqlite"
State = Literal["open", "ready", "taken", "dropped"]
"""Being sampled or left over; complete and kept; consumed by a step; rejected."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS made_with (setting TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fetches (last INTEGER PRIMARY KEY, source TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS groups (
    number INTEGER PRIMARY KEY, prompt TEXT NOT NULL, begun INTEGER NOT NULL, state TEXT NOT NULL,
    step INTEGER, place INTEGER, reason TEXT
);
CREATE INDEX IF NOT EXISTS by_step ON groups (state, step);
CREATE TABLE IF NOT EXISTS episodes (
    number INTEGER NOT NULL, position INTEGER NOT NULL, told TEXT NOT NULL,
    tokens BLOB NOT NULL, loss_mask BLOB NOT NULL, sampler_logprobs BLOB NOT NULL,
    PRIMARY KEY (number, position)
) WITHOUT ROWID;
"""
_ONLY_ID = "json_object('id', json_extract(prompt, '$.id'))"
"""What is kept of a prompt that is done with: rows can be large."""
_ARRAYS = {"tokens": np.int64, "loss_mask": np.bool_, "sampler_logprobs": np.float64}


class RolloutJournal:
    """Groups by their number since the start of the run. Each write is one transaction: there whole, or not at all.

    `path` None keeps it in memory. What was written survives the end of the process at any moment.
    Raises CheckpointError for a file that cannot be read or written.
    """

    def __init__(self, path: Path | None) -> None:
        remedy = "make room or make it writable, or move it away to sample anew what no checkpoint has seen"
        self._file = Database(path, _SCHEMA, remedy=remedy)

    @property
    def path(self) -> Path | None:
        return self._file.path

    # --- writing ------------------------------------------------------------------------------------------

    def fetched(self, groups: Sequence[Group], source: Mapping[str, Any]) -> None:
        """New groups, and where the prompts stand after them."""
        with self._file.transaction() as do:
            rows = [(number_of(g), json.dumps(_prompt_to(g.prompt), default=str), g.step, "open") for g in groups]
            do.executemany("INSERT INTO groups (number, prompt, begun, state) VALUES (?, ?, ?, ?)", rows)
            do.execute("INSERT INTO fetches VALUES (?, ?)", (rows[-1][0], _position_to(source)))

    def note(self, episode: Episode) -> None:
        """An episode as it is now."""
        with self._file.transaction() as do:
            self._write(do, episode)

    def left(self, group: Group) -> None:
        """A group that goes on, or begins anew, later."""
        self._set(group, "open")

    def kept(self, group: Group) -> None:
        """A group that is complete and passed the filter."""
        self._set(group, "ready")

    def dropped(self, group: Group, reason: str) -> None:
        """A group that will not be trained."""
        with self._file.transaction() as do:
            number = number_of(group)
            do.execute(
                f"UPDATE groups SET state = 'dropped', reason = ?, prompt = {_ONLY_ID} WHERE number = ?",
                (reason, number),
            )
            do.execute("DELETE FROM episodes WHERE number = ?", (number,))

    def taken(self, step: int, groups: Sequence[Group]) -> None:
        """The groups that a step consumes, in their order."""
        with self._file.transaction() as do:
            rows = [(step, place, number_of(group)) for place, group in enumerate(groups)]
            do.executemany("UPDATE groups SET state = 'taken', step = ?, place = ? WHERE number = ?", rows)

    def forget(self, step: int) -> None:
        """Let go of the content of the groups consumed up to `step`: nobody can go back behind it. They stay listed."""
        with self._file.transaction() as do:
            old = "SELECT number FROM groups WHERE state = 'taken' AND step <= ?"
            do.execute(f"DELETE FROM episodes WHERE number IN ({old})", (step,))
            do.execute(f"UPDATE groups SET prompt = {_ONLY_ID} WHERE state = 'taken' AND step <= ?", (step,))

    # --- going on -----------------------------------------------------------------------------------------

    def settings(self) -> dict[str, str]:
        """What the samples were made with, setting by setting; empty for a new journal."""
        return dict(self._file.rows("SELECT setting, value FROM made_with"))

    def begin(self, settings: Mapping[str, str]) -> None:
        """Forget everything, and note what samples are made with from now on."""
        with self._file.transaction() as do:
            for table in ("made_with", "fetches", "groups", "episodes"):
                do.execute(f"DELETE FROM {table}")
            do.executemany("INSERT INTO made_with VALUES (?, ?)", settings.items())

    def go_back(self, step: int, num_groups: int, settings: Mapping[str, str]) -> None:
        """Be as after `step`, when there were `num_groups` groups, with no sample of those that were not consumed."""
        with self._file.transaction() as do:
            do.execute("DELETE FROM groups WHERE number >= ?", (num_groups,))
            do.execute("DELETE FROM fetches WHERE last >= ?", (num_groups,))
            later = "state IN ('open', 'ready') OR (state = 'taken' AND step > ?)"
            do.execute(f"UPDATE groups SET state = 'open', step = NULL, place = NULL WHERE {later}", (step,))
            kept = "SELECT number FROM groups WHERE state = 'taken'"
            do.execute(f"DELETE FROM episodes WHERE number NOT IN ({kept})")
            do.execute("DELETE FROM made_with")
            do.executemany("INSERT INTO made_with VALUES (?, ?)", settings.items())

    def restart_unfinished(self) -> None:
        """Forget the samples of all groups that no step has consumed."""
        with self._file.transaction() as do:
            do.execute("UPDATE groups SET state = 'open' WHERE state = 'ready'")
            do.execute("DELETE FROM episodes WHERE number IN (SELECT number FROM groups WHERE state = 'open')")

    def position(self) -> tuple[int, dict[str, Any] | None]:
        """How many groups there are, and where the prompts stand; None before the first."""
        found = self._file.rows("SELECT last, source FROM fetches ORDER BY last DESC LIMIT 1")
        return (found[0][0] + 1, json.loads(found[0][1])) if found else (0, None)

    def last_step(self) -> int:
        """The last step that groups were consumed by; 0 before the first."""
        return self._file.rows("SELECT max(step) FROM groups")[0][0] or 0

    def last_forgotten(self) -> int:
        """The last step whose groups are only listed any more; 0 if there is none."""
        query = "SELECT max(step) FROM groups WHERE state = 'taken' AND number NOT IN (SELECT number FROM episodes)"
        return self._file.rows(query)[0][0] or 0

    def of_step(self, step: int, make: Any) -> list[Group]:
        """The groups that a step consumed, in their order; none if it has not come to that step."""
        return self._groups("state = 'taken' AND step = ? ORDER BY place", (step,), make)

    def in_state(self, state: State, make: Any) -> list[Group]:
        """The groups in this state, in the order of their numbers, with what is known of their episodes.

        `make(name, prompt, step)` makes a group of which nothing is sampled.
        """
        return self._groups("state = ? ORDER BY number", (state,), make)

    def census(self) -> list[tuple[int, str, str, int | None, str | None]]:
        """(number, prompt id, state, step, reason) of every group there ever was."""
        rows = self._file.rows("SELECT number, prompt, state, step, reason FROM groups ORDER BY number")
        return [(number, json.loads(prompt)["id"], *rest) for number, prompt, *rest in rows]

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    # --- rows ---------------------------------------------------------------------------------------------

    def _set(self, group: Group, state: State) -> None:
        with self._file.transaction() as do:
            do.execute("UPDATE groups SET state = ? WHERE number = ?", (state, number_of(group)))
            do.execute("DELETE FROM episodes WHERE number = ?", (number_of(group),))
            for position, episode in enumerate(group.episodes):
                self._write(do, episode, position)
            if group.baseline is not None:
                self._write(do, group.baseline)

    def _write(self, do: sqlite3.Cursor, episode: Episode, position: int | None = None) -> None:
        told = {f.name: getattr(episode, f.name) for f in dataclasses.fields(episode) if f.name not in _APART}
        arrays = [np.asarray(getattr(episode, name), dtype=dtype).tobytes() for name, dtype in _ARRAYS.items()]
        number = int(episode.group[1:])
        row = (number, episode.index if position is None else position, json.dumps(told, default=_plain), *arrays)
        do.execute("INSERT OR REPLACE INTO episodes VALUES (?, ?, ?, ?, ?, ?)", row)

    def _groups(self, where: str, values: tuple, make: Any) -> list[Group]:
        rows = self._file.rows(f"SELECT number, prompt, begun FROM groups WHERE {where}", values)
        return [self._group(make(name_of(n), Prompt(**json.loads(p)), begun)) for n, p, begun in rows]

    def _group(self, group: Group) -> Group:
        """The group with what is known of its episodes; those of which nothing is known are as `make` made them."""
        columns = ", ".join(_ARRAYS)
        query = f"SELECT position, told, {columns} FROM episodes WHERE number = ? ORDER BY position"
        known: dict[int, Episode] = {}
        for position, told, *blobs in self._file.rows(query, (number_of(group),)):
            fields = json.loads(told)
            fields["versions"] = [VersionSpan(**span) for span in fields["versions"]]
            for (name, dtype), blob in zip(_ARRAYS.items(), blobs, strict=True):
                fields[name] = np.frombuffer(blob, dtype=dtype).tolist()
            known[position] = Episode(prompt=group.prompt, **fields)
        group.baseline = known.pop(BASELINE_INDEX, group.baseline)
        size = max(len(group.episodes), 1 + max(known, default=-1))
        group.episodes = [known[i] if i in known else group.episodes[i] for i in range(size)]
        return group


_APART = ("prompt", *_ARRAYS)


def name_of(number: int) -> str:
    """The id of the group with this number; seeds follow from it."""
    return f"g{number}"


def number_of(group: Group) -> int:
    """The number of a group of this run."""
    return int(group.id[1:])


def _prompt_to(prompt: Prompt) -> dict[str, Any]:
    told = {f.name: getattr(prompt, f.name) for f in dataclasses.fields(prompt)}
    return {**told, "tokens": list(map(int, prompt.tokens)), "metadata": dict(prompt.metadata)}


def _position_to(source: Mapping[str, Any]) -> str:
    try:
        return json.dumps(source)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state_dict() of the source of prompts cannot be kept as JSON: {error}") from error


def _plain(value: Any) -> Any:
    """What JSON does not know of an episode: version spans, and numbers of numpy."""
    if isinstance(value, VersionSpan):
        return dataclasses.asdict(value)
    return value.item() if hasattr(value, "item") else str(value)
