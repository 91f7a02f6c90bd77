"""The examples of many GPUs made small: the same file, a tiny model of the same architecture, in any placement."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.config.loader import from_values, load
from whet.config.run import RunConfig
from whet.models.tiny import make_tiny

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FAMILIES = {
    "glm4-9b-grpo": "glm4",
    "qwen3-4b-grpo": "qwen3",
    "qwen3-30b-a3b-grpo": "qwen3_moe",
    "deepseek-r1-grpo": "deepseek_v3",
    "qwen3-4b-openhermes-sft": "qwen3",
    "search-r1-lite": "qwen3",
    "rloo-7b": "qwen3",
}
"""Folder of an example -> the architecture of its model; Qwen2's is Qwen3's without norms of queries and keys."""
FILES = sorted(path for name in FAMILIES for path in (EXAMPLES / name).glob("*.yaml"))

ALONE: Mapping[str, Any] = {
    **{"backend.use": "local", "backend.tensor_parallel": 1, "backend.context_parallel": 1, "backend.options": {}},
    **{"backend.pipeline_parallel": 1, "backend.expert_parallel": 1, "backend.sequence_parallel": False},
    **{"backend.zero_stage": 2, "engine.use": "local", "engine.num_engines": 1, "engine.tensor_parallel": 1},
    **{"engine.sleep": False, "engine.options": {}, "engine.start_timeout_s": 600, "cluster.num_processes": 1},
    **{"cluster.address": None, "cluster.num_nodes": 1, "cluster.devices_per_node": 1, "cluster.colocate": False},
}
"""One process with the embedded engine; another placement is given in its place."""


def shrunk(example: Path, folder: Path, placement: Mapping[str, Any] = ALONE, **settings: Any) -> RunConfig:
    """The configuration of an example over a tiny model and a few rows in `folder`, for two steps.

    `settings` are written with two underscores for the dot.
    """
    model = folder / "model"
    if not model.exists():
        make_tiny(model, family=FAMILIES[example.parent.name])
    small = {
        **{"model.path": str(model), "output_dir": str(folder / "out"), "data.train": rows_for(example, folder)},
        **{"data.cache_dir": str(folder / "cache"), "train.steps": 2, "log.progress": False, "log.tensorboard": False},
        **{"checkpoint.every_steps": 2, "eval.at_start": False, "eval.at_end": False},
    }
    config = load(None, str(example), []).config
    if config.method != "sft":
        small |= {"rollout.prompts_per_step": 4, "rollout.group_size": 3, "rollout.max_tokens": 6}
        small |= {"eval.max_tokens": 6, "eval.num_samples": 1}
        small |= {"rollout.oversampling": 8} if config.rollout.oversampling else {}
    for name in config.eval.sets:
        small[f"eval.sets.{name}.path"] = small["data.train"]
    given = {name.replace("__", "."): value for name, value in settings.items()}
    values = config.model_dump(exclude_defaults=True)
    for name, value in {**small, **placement, **given}.items():
        _put(values, name.split("."), value)
    return from_values(values, method=config.method, where=f"the small {example.parent.name}").config


def rows_for(example: Path, folder: Path) -> str:
    """A few rows in the format of the example's data; returns the path of the file."""
    asked = [f"{a}+{b}=" for a in range(1, 5) for b in range(1, 5)]
    if "sft" in example.parent.name:
        rows = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "10"}]} for text in asked
        ]
    elif "search" in example.parent.name:
        rows = [{"prompt": text, "label": "10"} for text in asked]
    else:
        rows = [{"prompt": [{"role": "user", "content": text}], "label": "10"} for text in asked]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value, in place of whatever lies there and beneath: flags would leave other options where they are."""
    for section in path[:-1]:
        values = values.setdefault(section, {})
    values[path[-1]] = value
