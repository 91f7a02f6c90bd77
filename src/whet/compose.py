"""From a configuration to a run: everything checked before a model is loaded, then put together."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from whet.backends.device import Arithmetic, choose
from whet.backends.local import LocalBackend, WithoutAdapter
from whet.backends.protocol import Backend
from whet.checkpoints.disk import writing
from whet.checkpoints.folder import RUN_FILE, check_folder, claimed
from whet.checkpoints.save import publish
from whet.config.loader import dump
from whet.config.plugin import resolve
from whet.config.run import RunConfig
from whet.engines.local.engine import LocalEngine
from whet.engines.protocol import Engine
from whet.errors import ConfigError
from whet.feeds import PromptFeed, RowFeed
from whet.keeper import Keeper
from whet.log import RunLog
from whet.loop import Loop
from whet.methods import Method
from whet.models.card import write_card
from whet.models.load import check_model_folder, load_model, load_tokenizer, stop_token_ids
from whet.recipe import method_of
from whet.schedule import plan
from whet.types import Episode

logger = logging.getLogger(__name__)

BACKENDS: dict[str, Any] = {"local": LocalBackend}
ENGINES: dict[str, Any] = {"local": LocalEngine}


@dataclass
class Policy:
    """A model ready to compute and to answer, with all that was resolved on the way to it."""

    config: RunConfig
    method: Method
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    arithmetic: Arithmetic
    backends: dict[str, Backend]

    @property
    def backend(self) -> Backend:
        return self.backends["policy"]

    def engine(self) -> Engine:
        """A new engine over the policy's own weights."""
        config = self.config.engine
        return _engine_maker(self.config)(
            self.backend.model,
            self.tokenizer,
            stop_token_ids=self.stop_token_ids,
            max_concurrent=config.max_concurrent,
            timeout_s=config.timeout_s,
            autocast=self.arithmetic.autocast,
        )


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
            total_steps = loop.schedule.total_steps
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
                await loop.run(log)
                if loop.finished:
                    self._finish(log, folder)
                else:
                    log.message(f"stopped after step {loop.global_step}; the same command goes on from here")
        return loop.progress.last_eval

    def _finish(self, log: RunLog, folder: Path) -> None:
        if self.keeper.restore_best(self.loop):
            log.message(f"the weights are those of step {self.loop.progress.best_step}, the best evaluation")
        publish(folder, self._export)
        log.message(f"the final model is in {self.policy.config.output_dir}")

    def _export(self, folder: Path) -> None:
        self.policy.backend.export_weights(folder)
        settings = (self.keeper.root / RUN_FILE).read_text(encoding="utf-8")  # what it was trained with
        run = yaml.safe_load(settings)
        known = {"base_model": run["model"]["path"], "method": run["method"], "settings": settings}
        write_card(folder, name=self.keeper.root.name, **known, metrics=self.loop.progress.last_eval)


def compose(config: RunConfig, method: Method | None = None) -> Run:
    """Check settings, then files and rows, then load the model and put the run together.

    Raises ConfigError, DataError, CheckpointError or ModelError; what can be known without the model is said
    before it is loaded.
    """
    method = method or method_of(config)
    _engine_maker(config)
    check_folder(config.output_dir, config.model)
    keeper = Keeper(config)
    feed, tokenizer = _feed(config, method)
    schedule = plan(config, len(feed), rollouts=method.source == "prompts")
    policy = load_policy(config, method, tokenizer, train=True)
    engine = policy.engine() if method.source == "prompts" else None
    connected = feed.connect(method, policy.backend, engine, policy.stop_token_ids)
    loop = Loop(config, method, connected.source, policy.backends, schedule, evaluate=connected.evaluate, saver=keeper)
    if keeper.found:
        keeper.restore(loop)
        logger.info("going on from %s", keeper.found)
    logger.info(", ".join(f"{name} {value}" for name, value in policy.backend.describe().items()))
    return Run(policy, feed, loop, keeper, engine)


async def evaluate(config: RunConfig) -> tuple[dict[str, float], tuple[Episode, ...]]:
    """Evaluate a model on the held-out data without training it: metrics, and a few episodes if it sampled any."""
    if config.data.eval is not None:  # the training data is not needed
        config = config.model_copy(update={"data": config.data.model_copy(update={"train": None})})
    method = method_of(config)
    feed, tokenizer = _feed(config, method)
    if feed.eval is None:
        raise ConfigError("there is no held-out data to evaluate on; set data.eval")
    policy = load_policy(config, method, tokenizer, train=False)
    engine = policy.engine() if method.source == "prompts" else None
    metrics = await feed.evaluate(method, policy.backend, engine, policy.stop_token_ids)
    return metrics, getattr(feed, "transcripts", ())


def load_policy(config: RunConfig, method: Method, tokenizer: PreTrainedTokenizerBase, *, train: bool) -> Policy:
    """Load the model on its device, with an optimizer if it is to be trained, and the reference if one is needed.

    Under a new adapter the reference is the policy with its adapter off; otherwise, and under an adapter that is
    trained on, it is a second copy of what the run began with.
    """
    make = resolve(config.backend.use, BACKENDS, what="backend", where="backend.use")
    arithmetic = choose(config.backend)
    if train and arithmetic.device.type == "cpu" and config.model.dtype == "float16":
        raise ConfigError("model.dtype is 'float16', which a CPU does not train in; use float32 or bfloat16")
    torch.manual_seed(config.seed)
    temperature = config.rollout.temperature if method.source == "prompts" else 1.0
    common = {"attention": config.model.attention, "temperature": temperature}
    model = load_model(config.model, arithmetic.device)
    backend = make(model, tokenizer, config.backend, arithmetic, optim=config.optim if train else None, **common)
    backends: dict[str, Backend] = {"policy": backend}
    if train and "reference" in method.roles:
        if config.model.adapter is not None:
            backends["reference"] = WithoutAdapter(backend)
        else:
            frozen = load_model(config.model, arithmetic.device).requires_grad_(False)
            backends["reference"] = make(frozen, tokenizer, config.backend, arithmetic, **common)
    return Policy(config, method, tokenizer, stop_token_ids(model, tokenizer), arithmetic, backends)


def _engine_maker(config: RunConfig) -> Any:
    return resolve(config.engine.use, ENGINES, what="engine", where="engine.use")


def _feed(config: RunConfig, method: Method) -> tuple[RowFeed | PromptFeed, PreTrainedTokenizerBase]:
    """Read and check the data, after what can be known of the model without its weights."""
    positions = check_model_folder(config.model)
    tokenizer = load_tokenizer(config.model)
    feed = (PromptFeed if method.source == "prompts" else RowFeed)(config, tokenizer)
    if positions is not None and feed.longest > positions:
        raise ConfigError(
            f"the longest sequence has {feed.longest:,} tokens, but the model has {positions:,} positions "
            f"(max_position_embeddings in its config.json); {feed.remedy}, or use a model that reads further"
        )
    return feed, tokenizer
