"""The journal of a sampling run: every finished group, whole or not at all, in an SQLite file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from whet.database import Database
from whet.errors import CheckpointError
from whet.types import Episode, Status

FILE = "journal.sqlite"
REMEDY = "make room or make it writable, or move it away to begin anew"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS made_with (setting TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS groups (
    position INTEGER PRIMARY KEY, prompt TEXT NOT NULL, scored INTEGER NOT NULL, completions TEXT NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class Completed:
    """One completion of a prompt: what was said and what it is worth. `score` is None where a reward failed."""

    index: int
    response: str
    score: float | None
    status: Status
    num_tokens: int
    rewards: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def of(cls, episode: Episode) -> Completed:
        told = episode.response, episode.reward, episode.status, episode.num_sampled
        return cls(episode.index, *told, rewards=dict(episode.rewards), error=episode.error)


class Journal:
    """Groups by the position of their prompt in the data. One writer at a time; each write is on the disk when done.

    `made_with` is what the completions follow from, setting by setting.
    Raises CheckpointError for a journal that was made with other settings, and for one that cannot be read or
    written.
    """

    def __init__(self, path: Path, made_with: Mapping[str, str]) -> None:
        self._file = Database(path, _SCHEMA, remedy=REMEDY, survives="machine")
        try:
            self._require(made_with)
            self._scored: dict[int, int] = dict(self._file.rows("SELECT position, scored FROM groups"))
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._scored)

    def __contains__(self, position: int) -> bool:
        return position in self._scored

    def num_scored(self, position: int) -> int:
        """Completions with a score in the group at a position; 0 where there is no group yet."""
        return self._scored.get(position, 0)

    def write(self, position: int, prompt: str, group: Sequence[Completed]) -> None:
        """Add a group in one transaction. `prompt` is the id of its prompt."""
        assert position not in self, f"the group at {position} is in the journal already"
        scored = sum(one.score is not None for one in group)
        content = json.dumps([asdict(one) for one in group], ensure_ascii=False)
        with self._file.transaction() as do:
            do.execute("INSERT INTO groups VALUES (?, ?, ?, ?)", (position, prompt, scored, content))
        self._scored[position] = scored

    def groups(self) -> Iterator[tuple[int, list[Completed]]]:
        """Every group with its position, in the order of the prompts, one at a time."""
        for position, content in self._file.each("SELECT position, completions FROM groups ORDER BY position"):
            yield position, [Completed(**one) for one in json.loads(content)]

    def close(self) -> None:
        """Let go of the file; what was written is in it alone, without files beside it."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _require(self, made_with: Mapping[str, str]) -> None:
        """Note what a new journal is made with; compare that of an old one."""
        known = dict(self._file.rows("SELECT setting, value FROM made_with"))
        if not known:
            with self._file.transaction() as do:
                do.executemany("INSERT INTO made_with VALUES (?, ?)", made_with.items())
            return
        changed = [name for name in {**known, **made_with} if known.get(name) != made_with.get(name)]
        if changed:
            listed = "; ".join(f"{name} was {_short(known, name)} and is {_short(made_with, name)}" for name in changed)
            raise CheckpointError(
                f"{self._file.path} holds completions that were made otherwise: {listed}. Restore what has changed, "
                "set output_dir to another folder, or remove the journal to begin anew"
            )


def _short(values: Mapping[str, str], name: str) -> str:
    value = values.get(name, "not there")
    return value if len(value) <= 60 else f"{value[:59]}…"
