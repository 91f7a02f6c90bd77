"""What sampled completions and their scores follow from: a journal holds to it, setting by setting."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from whet.checkpoints.save import checksum
from whet.config.plugin import resolve
from whet.config.run import RunConfig
from whet.errors import ConfigError
from whet.types import Prompt

NOT_ASKED = {"timeout_s", "request_timeout_s", "retries", "max_concurrent", "api_key_env", "optimizer_steps"}
"""Settings that decide how long something may take, not what comes out: they may change while a run goes on."""
SAMPLED = ("seed", "model", "rollout", "reward")
"""What completions of a model that is not trained, and their scores, follow from."""
ELSEWHERE = ("output_dir", "log", "checkpoint", "eval", "train", "data", "sample", "engine", "backend")
"""Sections that change nothing of what a policy in training samples, or of which only a part does."""


def sampled_with(config: RunConfig, prompts: Sequence[Prompt]) -> dict[str, str]:
    """What the completions of a sampling run and their scores follow from."""
    rewards = config.reward if isinstance(config.reward, list) else [config.reward]
    scored_by = [one.options["path"] for one in rewards if one is not None and one.use == "model"]
    models = {"model.path": config.model.path, **{f"reward.path {path}": path for path in scored_by}}
    folders = {name: path for name, path in models.items() if Path(path).expanduser().is_dir()}
    contents = {f"files of {name}": _content(path) for name, path in folders.items()}
    return {**_settings(config, SAMPLED, NOT_ASKED), **contents, "prompts": _digest(prompts)}


def trained_with(config: RunConfig, prompts: Sequence[Prompt]) -> dict[str, str]:
    """What the completions of a policy in training follow from beside its first weights; the files of users' own
    functions among it."""
    names = [name for name in RunConfig.model_fields if name not in ELSEWHERE]
    files = {f"file {path.name}": hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in _own_files(config)}
    return {**_settings(config, names, NOT_ASKED - {"optimizer_steps"}), **files, "prompts": _digest(prompts)}


def _settings(config: RunConfig, names: Sequence[str], left_out: Collection[str]) -> dict[str, str]:
    written = config.model_dump(mode="json")
    parts = {name: written[name] for name in names}
    parts |= {"engine": {"use": config.engine.use}, "backend": {"precision": config.backend.precision}}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in _flat(parts, left_out)}


def _flat(value: Any, left_out: Collection[str], name: str = "") -> Iterator[tuple[str, Any]]:
    """The settings within a value by their dotted names."""
    if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            if key not in left_out:
                yield from _flat(inner, left_out, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _own_files(config: RunConfig) -> list[Path]:
    """The files in which the functions stand that the configuration names by their dotted path."""
    found = set()
    for name, value in _flat(config.model_dump(mode="json"), ()):
        if not (name == "use" or name.endswith(".use")) or not isinstance(value, str) or ":" not in value:
            continue
        try:
            file = inspect.getsourcefile(inspect.unwrap(resolve(value, {}, what="function", where=name)))  # type: ignore[arg-type]
        except (TypeError, OSError, ConfigError):  # it has no file of its own, or has been refused elsewhere
            continue
        if file is not None and Path(file).is_file():
            found.add(Path(file))
    return sorted(found)


def _content(folder: str) -> str:
    """A hash of the files of a model."""
    kinds = (".safetensors", ".json", ".bin", ".jinja", ".model")
    files = sorted(path for path in Path(folder).expanduser().iterdir() if path.suffix in kinds)
    listed = [(path.name, checksum(path)) for path in files if path.is_file()]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _digest(prompts: Sequence[Prompt]) -> str:
    """Number and content of the prompts, what rewards read of them included."""
    digest = hashlib.sha256()
    for prompt in prompts:
        told = [prompt.id, list(prompt.tokens), prompt.content, prompt.label, dict(prompt.metadata)]
        digest.update(json.dumps(told, default=str).encode() + b"\n")
    return f"{len(prompts)} prompts, {digest.hexdigest()[:16]}"
