"""The kinds of folders that a model can be kept in, and which kind a folder is."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from whet.checkpoints.save import FOLDER, MARKER, checkpoints
from whet.errors import ModelError
from whet.models.source import ADAPTER_CONFIG
from whet.weights.stored import Format

FORMATS = {
    "hf": "whet.weights.hf",
    "megatron": "whet.weights.megatron.checkpoint",
    "torch_dist": "whet.weights.torch_dist",
}
"""Name -> the module that is the format, in the order in which a folder is held against them."""


def format_named(name: str) -> Format:
    """The format of that name."""
    return cast(Format, import_module(FORMATS[name]))


def format_of(folder: Path) -> Format:
    """The kind of a folder, by the names of its files.

    Raises ModelError for a folder of no kind, saying what it is instead and what to do.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise ModelError(f"{folder} {what}; give the folder of a model (of one on the hub: hf download NAME first)")
    if FOLDER.fullmatch(folder.name) and not (folder / MARKER).is_file():
        raise ModelError(f"{folder} has no {MARKER}: it was not written to its end; take an earlier checkpoint")
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter, which is no model without its base; convert both together with --merge, or "
            f"merge them first (whet merge {folder} OUTPUT)"
        )
    for name in FORMATS:
        if (found := format_named(name)).recognise(folder):
            return found
    if inside := checkpoints(folder):
        raise ModelError(f"{folder} holds checkpoints and is none; give {inside[-1]}, for example")
    names = sorted(path.name for path in folder.iterdir())
    listing = f"it holds {', '.join(names[:8])}{' …' if len(names) > 8 else ''}" if names else "it is empty"
    raise ModelError(
        f"{folder} is none of {', '.join(FORMATS)} ({listing}); give a folder that holds a model's weights"
    )
