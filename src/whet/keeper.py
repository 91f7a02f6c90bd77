"""Keeps a run on disk: checkpoints of the whole loop, and the way back from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import yaml

from whet.checkpoints.folder import RUN_FILE
from whet.checkpoints.resume import choose
from whet.checkpoints.save import prune, write
from whet.checkpoints.state import load_rng, read_json, save_rng, write_json
from whet.config.run import RunConfig
from whet.errors import CheckpointError
from whet.loop import Loop, Progress

STATE_FILE = "loop.json"
REFERENCE_FOLDER = "reference"
"""Beside the weights of a checkpoint, the reference that follows them."""
LEARNS_ALIKE = (
    *("log.", "checkpoint.", "output_dir", "cluster."),
    *("backend.use", "backend.tensor_parallel", "backend.context_parallel", "backend.pipeline_parallel"),
    *("backend.expert_parallel", "backend.sequence_parallel", "backend.reshard_after_forward", "backend.offload"),
    *("backend.zero_stage", "backend.timeout_s", "backend.threads", "backend.memory_gb", "backend.head_chunk_mb"),
    *("backend.activation_checkpointing", "backend.max_tokens_per_device", "backend.micro_batch_size"),
    *("engine.address", "engine.num_engines", "engine.tensor_parallel", "engine.python", "engine.router"),
    *("engine.start_timeout_s", "engine.timeout_s", "engine.health_interval_s", "engine.max_restarts"),
    *("engine.sleep", "engine.publish.", "engine.max_concurrent", "engine.prefix_cache_mb", "engine.packed_weights"),
    "engine.cache",
)
"""How names of settings begin that say where and how fast a run is computed, and what it tells: not what it learns."""


class Walk(Protocol):
    """A position in data that knows which data it goes over."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


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
            for role in loop.method.trains[1:]:
                loop.backends[role].save(folder / role)
            if self._moves_reference:
                loop.backends["reference"].save(folder / REFERENCE_FOLDER)
            save_rng(folder)
            state = {"method": self.config.method, "progress": asdict(progress), "source": loop.source.state_dict()}
            if loop.mix is not None:
                state["mix"] = loop.mix.state_dict()
            write_json(state, folder / STATE_FILE)

        written = write(self.root, progress.step, fill)
        protected = [self.folder(progress.best_step)] if self.config.checkpoint.best else []
        prune(self.root, self.config.checkpoint.keep, protect=protected)
        if (checkpointed := getattr(loop.source, "checkpointed", None)) is not None:
            checkpointed()
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
        for role in loop.method.trains[1:]:
            loop.backends[role].load(self.found / role)
        if self._moves_reference:
            loop.backends["reference"].load(self.found / REFERENCE_FOLDER)
        loop.source.load_state_dict(state["source"])
        if loop.mix is not None:
            if "mix" not in state:
                raise CheckpointError(
                    f"{self.found} was made without mix.data; remove it, or start in another output_dir"
                )
            loop.mix.load_state_dict(state["mix"])
        loop.progress = Progress(**state["progress"])
        load_rng(self.found)

    def check_data(self, walk: Walk) -> None:
        """Raise CheckpointError where the found checkpoint was made with other data than is walked over now.

        `walk` stands elsewhere afterwards.
        """
        if self.found is None:
            return
        state = read_json(self.found / STATE_FILE)["source"]
        nested = [state, *(value for value in state.values() if isinstance(value, dict))]
        for one in nested:
            if "fingerprint" in one:
                walk.load_state_dict(one)

    def changes(self) -> list[str]:
        """The settings that are others than those the found checkpoint was trained with, as `optim.lr: 0.1 -> 0.2`.

        Those that change nothing of what is learned (`LEARNS_ALIKE`) are left out.
        """
        path = self.found.parent / RUN_FILE if self.found is not None else None
        if path is None or not path.is_file():
            return []
        before, now = _flat(yaml.safe_load(path.read_text(encoding="utf-8"))), _flat(self.config.model_dump())
        names = [name for name in {**before, **now} if not name.startswith(LEARNS_ALIKE)]
        return [f"{n}: {before.get(n)} -> {now.get(n)}" for n in names if before.get(n) != now.get(n)]

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
        for role in loop.method.trains[1:]:
            loop.backends[role].load(self.folder(best) / role)
        return True


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    if not isinstance(settings, dict) or not settings:
        return {prefix.rstrip("."): settings}
    return {name: value for key, inner in settings.items() for name, value in _flat(inner, f"{prefix}{key}.").items()}
