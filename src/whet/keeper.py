"""Keeps a run on disk: checkpoints of the whole loop, and the way back from them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from whet.checkpoints.resume import choose
from whet.checkpoints.save import prune, write
from whet.checkpoints.state import load_rng, read_json, save_rng, write_json
from whet.config.run import RunConfig
from whet.errors import CheckpointError
from whet.loop import Loop, Progress

STATE_FILE = "loop.json"
REFERENCE_FOLDER = "reference"
"""Beside the weights of a checkpoint, the reference that follows them."""


class Keeper:
    """Saves a loop to `output_dir/checkpoint-N` and restores it, to the bit on a CPU."""

    def __init__(self, config: RunConfig):
        self.config = config
        # Whoever changes the working folder between two steps still has one run in one place.
        self.root = Path(config.output_dir).absolute()
        self.found = choose(config.checkpoint.resume, self.root)
        """The checkpoint that this run goes on from, or None."""
        if self.found is not None:
            self._check_method(self.found)

    def save(self, loop: Loop, *, best: bool) -> Path:
        """Write weights, optimizer, data position, random states and progress; remove what is too old."""
        progress = loop.progress

        def fill(folder: Path) -> None:
            loop.policy.save(folder)
            if self._moves_reference:
                loop.backends["reference"].save(folder / REFERENCE_FOLDER)
            save_rng(folder)
            state = {"method": self.config.method, "progress": asdict(progress), "source": loop.source.state_dict()}
            write_json(state, folder / STATE_FILE)

        written = write(self.root, progress.step, fill)
        protected = [self.folder(progress.best_step)] if self.config.checkpoint.best else []
        prune(self.root, self.config.checkpoint.keep, protect=protected)
        return written

    @property
    def _moves_reference(self) -> bool:
        return self.config.reference.sync_steps is not None

    def folder(self, step: int | None) -> Path:
        return self.root / f"checkpoint-{step}"

    def restore(self, loop: Loop) -> None:
        """Put the loop where the found checkpoint left it."""
        assert self.found is not None, "there is nothing to restore"
        state = read_json(self.found / STATE_FILE)
        loop.policy.load(self.found)
        if self._moves_reference:
            loop.backends["reference"].load(self.found / REFERENCE_FOLDER)
        loop.source.load_state_dict(state["source"])
        loop.progress = Progress(**state["progress"])
        load_rng(self.found)

    def _check_method(self, folder: Path) -> None:
        method = read_json(folder / STATE_FILE)["method"]
        if method != self.config.method:
            raise CheckpointError(
                f"{folder} was made by {method}, and this is a run of {self.config.method}; give that checkpoint as "
                "model.path to begin with its weights, and set output_dir to another folder"
            )

    def restore_best(self, loop: Loop) -> bool:
        """Load the best checkpoint's weights for the end of the run. Returns whether there was one."""
        best = loop.progress.best_step
        if not self.config.checkpoint.best or best is None or best == loop.progress.step:
            return False
        if not self.folder(best).is_dir():
            raise CheckpointError(
                f"the best checkpoint, {self.folder(best)}, is gone; the weights of step {loop.progress.step} remain. "
                "Set checkpoint.best to false to end with them"
            )
        loop.policy.load(self.folder(best))
        return True
