"""From a configuration to a run: everything checked before a model is loaded, then put together."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from whet.backends.device import Arithmetic, choose
from whet.backends.local import LocalBackend, WithoutAdapter
from whet.backends.protocol import Backend
from whet.config.loader import dump
from whet.config.plugin import resolve
from whet.config.run import RunConfig
from whet.engines.local.engine import LocalEngine
from whet.engines.protocol import Engine
from whet.feeds import PromptFeed, RowFeed
from whet.keeper import Keeper
from whet.log import RunLog
from whet.loop import Loop
from whet.methods import Method
from whet.models.adapters import has_adapter
from whet.models.card import write_card
from whet.models.load import check_model_folder, load_model, load_tokenizer, stop_token_ids
from whet.recipe import method_of
from whet.schedule import plan

logger = logging.getLogger(__name__)

BACKENDS: dict[str, Any] = {"local": LocalBackend}
ENGINES: dict[str, Any] = {"local": LocalEngine}


@dataclass
class Run:
    """A composed run. `train` takes it to its end and leaves the final model in `output_dir`."""

    config: RunConfig
    method: Method
    tokenizer: PreTrainedTokenizerBase
    backends: dict[str, Backend]
    feed: RowFeed | PromptFeed
    loop: Loop
    keeper: Keeper
    engine: Engine | None = None

    @property
    def policy(self) -> Backend:
        return self.backends["policy"]

    async def train(self) -> dict[str, float]:
        """Train, end with the best weights if asked to, and export. Returns the last evaluation."""
        with self.loop.log:
            await self.loop.run()
            if self.loop.finished:
                self._finish()
            else:
                self.loop.log.message(f"stopped after step {self.loop.global_step}; the same command goes on from here")
        return self.loop.progress.last_eval

    def _finish(self) -> None:
        log, folder = self.loop.log, Path(self.config.output_dir)
        if self.keeper.restore_best(self.loop):
            log.message(f"the weights are those of step {self.loop.progress.best_step}, the best evaluation")
        self.policy.export_weights(folder)
        config = self.config
        settings = {"base_model": config.model.path, "method": config.method, "settings": dump(config)}
        write_card(folder, **settings, metrics=self.loop.progress.last_eval)
        log.message(f"the final model is in {folder}")


def compose(config: RunConfig) -> Run:
    """Check settings, then files and rows, then load the model and put the run together.

    Raises ConfigError, DataError, CheckpointError or ModelError; what can be known without the model is said
    before it is loaded.
    """
    method = method_of(config)
    make_backend = resolve(config.backend.use, BACKENDS, what="backend", where="backend.use")
    make_engine = resolve(config.engine.use, ENGINES, what="engine", where="engine.use")
    keeper = Keeper(config)
    check_model_folder(config.model)
    tokenizer = load_tokenizer(config.model)
    feed = (PromptFeed if method.source == "prompts" else RowFeed)(config, tokenizer)
    schedule = plan(config, len(feed), rollouts=method.source == "prompts")
    arithmetic = choose(config.backend)
    torch.manual_seed(config.seed)
    backends = _backends(config, method, tokenizer, arithmetic, make_backend)
    stops = stop_token_ids(backends["policy"].model, tokenizer)
    engine = None
    if method.source == "prompts":
        engine = make_engine(
            backends["policy"].model,
            tokenizer,
            stop_token_ids=stops,
            max_concurrent=config.engine.max_concurrent,
            timeout_s=config.engine.timeout_s,
            autocast=arithmetic.autocast,
        )
    connected = feed.connect(method, backends["policy"], engine, stops)
    log = _open_log(config, keeper, schedule.total_steps)
    loop = Loop(config, method, connected.source, backends, schedule, log, evaluate=connected.evaluate, saver=keeper)
    if keeper.found:
        keeper.restore(loop)
        log.message(f"going on from {keeper.found}")
    log.message(", ".join(f"{name} {value}" for name, value in backends["policy"].describe().items()))
    return Run(config, method, tokenizer, backends, feed, loop, keeper, engine)


def _open_log(config: RunConfig, keeper: Keeper, total_steps: int) -> RunLog:
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "run.yaml").write_text(dump(config), encoding="utf-8")
    return RunLog(output, config.log, total_steps=total_steps, resume_step=keeper.found_step)


def _backends(config: RunConfig, method: Method, tokenizer, arithmetic: Arithmetic, make: Any) -> dict[str, Backend]:
    """The policy, and a reference where the method needs one.

    Under an adapter the reference is the policy with its adapter off; otherwise it is a second copy of the
    weights that the run began with.
    """
    temperature = config.rollout.temperature if method.source == "prompts" else 1.0
    common = {"attention": config.model.attention, "temperature": temperature}
    model = load_model(config.model, arithmetic.device)
    policy = make(model, tokenizer, config.backend, arithmetic, optim=config.optim, **common)
    backends: dict[str, Backend] = {"policy": policy}
    if "reference" in method.roles:
        if has_adapter(model):
            backends["reference"] = WithoutAdapter(policy)
        else:
            frozen = load_model(config.model, arithmetic.device)
            frozen.requires_grad_(False)
            backends["reference"] = make(frozen, tokenizer, config.backend, arithmetic, **common)
    return backends
