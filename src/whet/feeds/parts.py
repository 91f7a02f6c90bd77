"""The data of a run in its two parts, to train on and held out: read, divided, and each fault reported."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from whet.config.run import RunConfig
from whet.errors import ConfigError, Gathering

logger = logging.getLogger(__name__)


def read_parts(config: RunConfig, tokenizer: PreTrainedTokenizerBase, read: Callable, errors: Gathering):
    """(training data, held-out data), None for what is not there or cannot be read, each reported."""
    data, settings = config.data, config.eval
    found: dict[str, Any] = {"train": None, "eval": None}
    for what, paths in (("train", data.train), ("eval", data.eval)):
        if paths is not None:
            with errors.going_on():
                found[what] = read(data, paths, tokenizer, what=what, errors=errors)
    train, held = found["train"], found["eval"]
    if train is not None and data.eval_share:
        with errors.going_on():
            train, held = train.hold_out(data.eval_share, config.seed)
    for name, part in (("training", train), ("held-out", held)):
        if part is not None:
            logger.info("%s data: %s", name, part.report)
    is_asked = settings.every_steps or settings.every_epochs or settings.at_start
    if is_asked and data.eval is None and not data.eval_share and not settings.sets:
        text = "an evaluation is asked for, but there is no held-out data; set data.eval or data.eval_share"
        with errors.going_on():
            raise ConfigError(text)
    return train, held


def without_training_data(config: RunConfig) -> RunConfig:
    """The configuration of those who do not read what is trained on."""
    return config.model_copy(update={"data": config.data.model_copy(update={"train": None})})
