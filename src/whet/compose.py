"""From a configuration to a run: everything checked before a model is loaded, then put together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from whet.check.examine import examine
from whet.checkpoints.disk import writing
from whet.checkpoints.folder import RUN_FILE, claimed
from whet.checkpoints.save import publish
from whet.config.loader import dump
from whet.config.run import RunConfig
from whet.data.encode import digest_vocabulary
from whet.engines.protocol import Engine
from whet.errors import CheckpointError, ConfigError
from whet.feeds.parts import without_training_data
from whet.feeds.prompts import PromptFeed
from whet.feeds.rows import RowFeed
from whet.keeper import Keeper
from whet.log import RunLog
from whet.loop import Loop
from whet.methods import Method
from whet.models.card import write_card
from whet.models.source import adapter_base
from whet.ranks.crew import Crew
from whet.roles import Policy, load_policy
from whet.rollout.dump import FOLDER, Dump, DumpedSource
from whet.rollout.protocols import Source
from whet.rollouts_only import SamplingLoop
from whet.types import Episode

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A composed run. `train` takes it to its end and leaves the final model in `output_dir`."""

    policy: Policy
    feed: RowFeed | PromptFeed
    loop: Loop
    keeper: Keeper
    engine: Engine | None = None

    async def train(self) -> dict[str, float]:
        """Train, end with the best weights if asked to, and export. Returns the last evaluation."""
        config, loop = self.policy.config, self.loop
        # Nothing is written before: what is refused, or only predicts, leaves the files of an earlier run alone.
        with claimed(self.keeper.root) as folder:
            total_steps = loop.schedule.last_step
            if loop.finished and (folder / RUN_FILE).is_file():
                logger.warning(
                    "%s stands at step %d of %d: nothing is trained, and other settings change nothing; raise "
                    "train.steps or train.epochs, or set output_dir to another folder",
                    *(folder, loop.global_step, total_steps),
                )
            else:
                with writing(folder / RUN_FILE):
                    (folder / RUN_FILE).write_text(dump(config), encoding="utf-8")
            with RunLog(folder, config.log, total_steps=total_steps, resume_step=loop.global_step) as log:
                try:
                    await loop.run(log)
                finally:
                    for engine in self.policy.servers.values():
                        await engine.close()
                if loop.finished:
                    self._finish(log, folder)
                else:
                    log.message(f"stopped after step {loop.global_step}; the same command goes on from here")
        return loop.progress.last_eval

    def _finish(self, log: RunLog, folder: Path) -> None:
        if self.policy.config.debug.rollout_only:
            log.message(f"the rollouts are in {folder / FOLDER}; nothing was trained")
            return
        if self.keeper.restore_best(self.loop):
            log.message(f"the weights are those of step {self.loop.progress.best_step}, the best evaluation")
        publish(folder, self._export)
        log.message(f"the final model is in {self.policy.config.output_dir}")

    def _export(self, folder: Path) -> None:
        self.policy.backend.export_weights(folder)
        for role in self.policy.method.trains[1:]:
            self.policy.backends[role].export_weights(folder / role)
        settings = (self.keeper.root / RUN_FILE).read_text(encoding="utf-8")  # what it was trained with
        run = yaml.safe_load(settings)
        known = {"base_model": run["model"]["path"], "method": run["method"], "settings": settings}
        write_card(folder, name=self.keeper.root.name, **known, metrics=self.loop.progress.last_eval)


def compose(config: RunConfig, method: Method | None = None, crew: Crew | None = None) -> Run:
    """Check settings, then files and rows, then load the model and put the run together; with a `crew`, over its ranks.

    Raises ConfigError, DataError, CheckpointError or ModelError; what can be known without the model is said
    before it is loaded.
    """
    found = examine(config, method)
    found.errors.refuse()
    method, tokenizer, feed, keeper, schedule = found.method, found.tokenizer, found.feed, found.keeper, found.schedule
    assert method is not None and tokenizer is not None and feed is not None, "what is missing has been refused"
    assert keeper is not None and schedule is not None, "what is missing has been refused"
    trains = not config.debug.rollout_only
    if keeper.found and not trains:
        raise CheckpointError(
            f"debug.rollout_only samples from model.path, but {keeper.found} is of a run that trains; set output_dir "
            "to another folder"
        )
    policy = load_policy(config, method, tokenizer, train=trains, crew=crew)
    connected = feed.connect(policy)
    source = connected.source
    if config.log.rollouts or not trains:
        about = {"method": config.method, "num_prompts": len(feed), "vocabulary": digest_vocabulary(tokenizer)}
        source = _dumped(source, config, keeper.root / FOLDER, about)
    if trains:
        beside = {"evaluate": connected.evaluate, "saver": keeper, "mix": connected.mix}
        loop = Loop(config, method, source, policy.backends, schedule, **beside)
    else:
        loop = SamplingLoop(config, method, source, policy.backends, schedule)
    if keeper.found:
        keeper.restore(loop)
        logger.info("going on from %s", keeper.found)
    logger.info(", ".join(f"{name} {value}" for name, value in policy.backend.describe().items()))
    return Run(policy, feed, loop, keeper, connected.engine)


async def evaluate(config: RunConfig, crew: Crew | None = None) -> tuple[dict[str, float], tuple[Episode, ...]]:
    """Evaluate a model on the held-out data without training it: metrics, and a few episodes if it sampled any."""
    if config.data.eval is not None:  # the training data is not needed
        config = without_training_data(config)
    elif config.eval.sets:  # nor is it for these, unless a part of it is held out
        config = config if config.data.eval_share else without_training_data(config)
    elif not config.data.eval_share:
        raise ConfigError("there is no held-out data to evaluate on; set data.eval")
    is_adapter = adapter_base(config.model) is not None
    if is_adapter:  # the configuration it was trained with asks for a new one, which evaluation has no use for
        config = config.model_copy(update={"model": config.model.model_copy(update={"adapter": None})})
    found = examine(config, trains=False)
    found.errors.refuse()
    method, tokenizer, feed = found.method, found.tokenizer, found.feed
    assert method is not None and tokenizer is not None and feed is not None, "what is missing has been refused"
    if feed.eval is None and not config.eval.sets:
        raise ConfigError("there is no held-out data to evaluate on; set data.eval")
    if method.source == "rows" and "reference" in method.roles and config.reference.path is None and not is_adapter:
        logger.warning(
            "reference.path is not given, so the model is held against itself and all log-ratios are 0; set it to the "
            "model that the training began with"
        )
    policy = load_policy(config, method, tokenizer, train=False, crew=crew)
    metrics = await feed.evaluate(policy)
    return metrics, getattr(feed, "transcripts", ())


def _dumped(source: Source, config: RunConfig, folder: Path, about: Mapping[str, Any]) -> Source:
    """The source, with every step that it gives out written to a folder."""
    kind = "parquet" if config.log.rollouts == "parquet" else "jsonl"
    return DumpedSource(source, Dump(folder, about, format=kind, keep=config.log.keep_rollouts))
