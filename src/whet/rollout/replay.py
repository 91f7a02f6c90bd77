"""Rollouts taken from disk in place of an engine, to train once more on exactly what was sampled before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.engines.protocol import Engine
from whet.errors import CheckpointError, DataError
from whet.rollout.dump import ABOUT_FILE, FOLDER, read_lines, step_files
from whet.rollout.group import Rollout
from whet.rollout.lines import groups_of, units_of
from whet.rollout.protocols import StateDict
from whet.rollout.statistics import age_metrics, rollout_metrics
from whet.types import Unit


class Replay:
    """Gives out the units that a dumped run trained on, step by step. Implements `rollout.protocols.Source`.

    `folder` is the dump, or the folder of the run that holds it. `engine`, if there is one, follows the weights: an
    evaluation samples from it. All steps must be there from the first on, and the first is read at once.
    Raises DataError naming the file otherwise.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
        self.engine: Engine | None = None
        self.about = self._about()
        self._files = self._contiguous()
        self._step = self._version = 0
        self.stats: dict[str, float] = {}
        """Metrics of the last step, as they were logged then, but for those of speed."""
        self._units(1)

    def __len__(self) -> int:
        """Steps that can be replayed."""
        return len(self._files)

    @property
    def num_prompts(self) -> int:
        """Prompts of the data set that the run went over; the schedule follows from it."""
        return int(self.about["num_prompts"])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of the first step."""
        return max(len(sample.tokens) for unit in self._units(1)[0] for sample in unit.samples)

    def require(self, column: str, who: str) -> None:
        """Raise DataError where the first step was dumped without a column that `who` reads."""
        if any(column not in unit.columns for unit in self._units(1)[0]):
            raise DataError(
                f"debug.train_only is {str(self.folder)!r}, whose run did not sample the {column} that {who} reads; "
                "replay a run of the same method"
            )

    def require_vocabulary(self, digest: str) -> None:
        """Raise DataError where the ids of the dump stand for other words."""
        if self.about.get("vocabulary", digest) != digest:
            raise DataError(
                f"debug.train_only is {str(self.folder)!r}, whose run had another tokenizer than model.path: "
                "its token ids would mean something else; give a model with the tokenizer of that run"
            )

    async def take(self, n: int) -> list[Unit]:
        """The units of the next step, however many it had. Raises DataError after the last step."""
        if self._step >= len(self):
            raise DataError(f"{self.folder} holds {len(self)} steps, and all of them have been replayed")
        self._step += 1
        units, self.stats = self._units(self._step)
        return units

    async def publish(self, snapshot: int) -> None:
        """The policy has new weights, of this version."""
        self._version = snapshot
        if self.engine is not None:
            await self.engine.update_weights(snapshot)

    def state_dict(self) -> StateDict:
        return {"replayed": self._step, "version": self._version, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises CheckpointError for a state of other data."""
        if state.get("fingerprint") != self._fingerprint():
            raise CheckpointError(
                f"the checkpoint was not made by replaying {self.folder}; set output_dir to another folder"
            )
        self._step, self._version = state["replayed"], state["version"]

    def _units(self, step: int) -> tuple[list[Unit], dict[str, float]]:
        path = self._files[step - 1]
        lines = read_lines(path)
        try:
            units, groups = units_of(lines), groups_of(lines)
        except (DataError, KeyError, TypeError, AssertionError) as error:
            raise DataError(f"{path}: {error}") from error
        if not units:
            raise DataError(f"{path} holds nothing that was trained on; dump the rollout anew")
        measured = rollout_metrics(Rollout(tuple(groups), 0.0, 0.0)) | age_metrics(groups, self._version)
        return units, {name: value for name, value in measured.items() if not name.startswith("perf/")}

    def _about(self) -> dict[str, Any]:
        path = self.folder / ABOUT_FILE
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"debug.train_only is {str(self.folder)!r}, where no run has left rollouts ({path.name}: {error}); "
                "give the folder of a run with log.rollouts"
            ) from error

    def _contiguous(self) -> list[Path]:
        found = step_files(self.folder)
        missing = [step for step in range(1, max(found, default=0) + 1) if step not in found]
        if not found or missing:
            what = f"step {missing[0]} is missing" if missing else "there is no step"
            raise DataError(
                f"debug.train_only is {str(self.folder)!r}, but {what}: a replay begins with step 1 and leaves none "
                "out; dump the run anew without log.keep_rollouts"
            )
        return [found[step][0] for step in range(1, max(found) + 1)]

    def _fingerprint(self) -> str:
        return hashlib.sha256(self._files[0].read_bytes()).hexdigest()
