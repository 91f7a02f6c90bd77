"""The small files beside a model's weights: its arguments. They go wherever the weights go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from whet.models.source import INDEXES

CONFIG = "config.json"
SUFFIXES = {".json", ".jinja", ".txt", ".model", ".md", ".py", ".tiktoken"}
LICENSES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
FOLDERS = ("additional_chat_templates",)
NOT_OF_THE_MODEL = {
    *INDEXES,
    *("complete.json", "loop.json", "scaler.json", "report.json", "whet.json", "trainer_state.json"),
}
"""What a run, or a conversion, leaves beside a model and is no part of it."""


def read_arguments(folder: Path) -> dict[str, bytes]:
    """The arguments in a folder, by name: configuration, tokenizer, chat templates, code, card, licence."""
    found = [path for path in folder.iterdir() if path.suffix in SUFFIXES or path.name.startswith(LICENSES)]
    for name in FOLDERS:
        found += (folder / name).glob("*") if (folder / name).is_dir() else []
    kept = [path for path in found if path.is_file() and path.name not in NOT_OF_THE_MODEL]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(kept)}


def write_arguments(arguments: Mapping[str, bytes], folder: Path) -> None:
    """Write them back as they were."""
    for name, content in arguments.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def config_of(arguments: Mapping[str, bytes]) -> dict[str, Any]:
    """The model's configuration, as its file says it."""
    return json.loads(arguments[CONFIG])


def with_dtype(arguments: Mapping[str, bytes], dtype: torch.dtype) -> dict[str, bytes]:
    """The arguments with a configuration that names this type."""
    config = config_of(arguments)
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    return {**arguments, CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
