"""What is looked at in every import: whether the result is a configuration of ours, and what was set aside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from whet.config.loader import load
from whet.config.run import RunConfig
from whet.methods import METHODS
from whet.migrate.build import Imported
from whet.migrate.write import configuration
from whet.recipe import method_of

Import = Callable[..., Imported]
"""Write a text to a file, named third, and import it: `imported("trl", text, "dpo.yaml", method="dpo")`."""


def loaded(result: Imported) -> RunConfig:
    """The configuration as it is after it was written and read again, which must be the same."""
    assert result.missing == [] and result.config is not None
    Path("written.yaml").write_text(configuration(result), encoding="utf-8")
    config = load(None, "written.yaml", []).config
    assert config == result.config
    if config.method in METHODS:
        method_of(config)
    return config


def lost(result: Imported) -> dict[str, str]:
    return {one.name: one.why for one in result.lost}


def idle(result: Imported) -> dict[str, str]:
    return {one.name: one.why for one in result.idle}
