"""The training run that goes on with what was sampled: read and checked before anything is sampled."""

from __future__ import annotations

import logging
from pathlib import Path

from whet.checkpoints.folder import check_folder
from whet.config.loader import load
from whet.config.names import any_of
from whet.config.rules import ROWS_FOR
from whet.config.run import RunConfig
from whet.errors import ConfigError
from whet.models.load import check_model_folder
from whet.recipe import method_of

logger = logging.getLogger(__name__)

ASKED = ("chat", "system", "prompt_template", "template_kwargs")
"""Settings of `data` that a prompt is put in words by."""


def following(config: RunConfig, rows: Path) -> RunConfig | None:
    """The configuration that `sample.then` names, with the rows as its training data; None where it names none.

    Raises ConfigError for a method that does not go with what is selected, and whatever that run would raise
    before its data is there.
    """
    then = config.sample.then
    if then is None:
        return None
    found = load(None, then, ["--data.train", str(rows)]).config
    fits = ROWS_FOR[config.sample.select]
    if found.method not in fits:
        others = [select for select, methods in ROWS_FOR.items() if found.method in methods]
        remedy = f", or set sample.select to {any_of(others)}" if others else ""
        raise ConfigError(
            f"sample.then is {then!r}, a run of {found.method}, but the rows of sample.select "
            f"{config.sample.select!r} are for {any_of(fits)}; give such a configuration{remedy}"
        )
    if Path(found.output_dir).resolve() == Path(config.output_dir).resolve():
        raise ConfigError(
            f"output_dir is {config.output_dir!r} both here and in {then}; set one of them to another folder"
        )
    method = method_of(found)
    check_folder(found.output_dir, found.model)
    check_model_folder(found.model, scores=method.scores)
    for name in ASKED:
        here, there = getattr(config.data, name), getattr(found.data, name)
        if here != there:
            logger.warning(
                "prompts are sampled with data.%s %r, but %s trains with %r: the model will see them in other words",
                *(name, here, then, there),
            )
    return found
