"""Settings of the libraries beneath, under their own names with a prefix: `--vllm-max-model-len 4096`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from whet.config.conversions import Alias, Converted
from whet.config.names import Path
from whet.config.run import RunConfig

SECTIONS: Mapping[str, str] = {"vllm": "engine", "sglang": "engine", "megatron": "backend", "deepspeed": "backend"}
"""Whose settings are passed through -> the section that chooses it by `use`, and holds them in `options`."""


def passed_through(path: Path) -> Alias | None:
    """What becomes of a name that begins with one of the prefixes; None for any other."""
    if len(path) != 1:
        return None
    library, _, name = str(path[0]).partition("_")
    section = SECTIONS.get(library)
    if section is None or not name:
        return None
    target = f"{section}.options.{name}"

    def convert(value: Any, method: str) -> Converted:
        return {target: value}

    return Alias(str(path[0]), (library,), "sets", convert, (target,), switch=True, check=_belongs(section, library))


def _belongs(section: str, library: str) -> Callable[[RunConfig, Any], str | None]:
    def check(config: RunConfig, value: Any) -> str | None:
        use = getattr(config, section).use
        if use == library or SECTIONS.get(use) != section:  # of one that takes no options, the rules tell
            return None
        return f"but {section}.use is {use!r}; set it to {library}, or remove this"

    return check
