"""Data sets as other tools name them: a name on the hub with its parts, or what `dataset_info.json` says of one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.config.names import did_you_mean
from whet.errors import ConfigError

_SLICED = re.compile(r"([\w.-]+)\[(-?\d*):(-?\d*)\]")
DATA_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def hub_name(name: object, subset: object, split: object, where: str) -> str:
    """`owner/name`, `owner/name:split` or `owner/name:subset:split`, with the slice of the split; a file as it is.

    Raises ConfigError for a split that cannot be said here, such as `train[:10%]`.
    """
    if not isinstance(name, str) or not isinstance(split, str):
        raise ConfigError(f"{where}: a data set and its split are texts, got {name!r} and {split!r}")
    cut = ""
    if "[" in split or "+" in split:
        match = _SLICED.fullmatch(split)
        if match is None:
            raise ConfigError(
                f"{where}: the split {split!r} cannot be said here; a slice counts rows, as in train[:1000]"
            )
        split, cut = match[1], f"@[{match[2]}:{match[3]}]"
    if Path(name).suffix.lower() in DATA_FILES:
        return name + cut
    middle = f":{subset}" if subset else ""
    return name + middle + (f":{split}" if subset or split != "train" else "") + cut


class Unlike(ValueError):
    """A data set that cannot be read here as it is; the message says why and what to do."""


@dataclass(frozen=True)
class DataSet:
    """One data set of LLaMA-Factory in our terms."""

    paths: tuple[str, ...]
    columns: Mapping[str, str]
    """Our name of a column -> the file's, where they differ."""
    remarks: tuple[str, ...] = ()


_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_SHARED = {name: name for name in ("system", "tools", "chosen", "rejected", "kto_tag")}
_SHAREGPT_TAGS = {
    **{"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    **{"observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"},
}
_OPENAI_TAGS = {
    **{"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    **{"observation_tag": "tool", "system_tag": "system"},
}
_MEDIA = ("images", "videos", "audios")


def read_info(folder: str) -> dict[str, Any]:
    """`dataset_info.json` of a folder. Raises ConfigError where it cannot be read, with the line."""
    if folder.startswith("REMOTE:"):
        raise ConfigError(
            f"dataset_dir is {folder!r}: fetch it with its dataset_info.json, and give its folder with --dataset_dir"
        )
    path = Path(folder) / "dataset_info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; give the folder that holds it in dataset_dir, or with --dataset_dir"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from error
    if not isinstance(info, dict):
        raise ConfigError(f"{path}: expected a mapping of names to data sets")
    return info


def describe(name: str, info: Mapping[str, Any], folder: str, stage: str, limit: int | None) -> DataSet:
    """What `dataset_info.json` says of one data set, for a stage of LLaMA-Factory; at most `limit` rows of it.

    Raises ConfigError for a name that is not there, and Unlike for what cannot be read here.
    """
    where = f"{Path(folder) / 'dataset_info.json'}: {name}"
    entry = info.get(name)
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is not in it{did_you_mean(name, info)}")
    columns = entry.get("columns") or {}
    if media := [medium for medium in _MEDIA if medium in columns]:
        raise Unlike(f"it has {', '.join(media)}, and models read text here; leave it out")
    if stage == "pt":
        mapped = {"text": columns.get("prompt", "instruction")}
    elif entry.get("formatting", "alpaca") == "sharegpt":
        mapped = _sharegpt(entry, columns)
    else:
        mapped = _alpaca(entry, columns, stage)
    remarks = _differences(name, entry, columns, stage)
    return DataSet(_paths(entry, folder, where, limit), {a: b for a, b in mapped.items() if a != b}, remarks)


def _paths(entry: Mapping[str, Any], folder: str, where: str, limit: int | None) -> tuple[str, ...]:
    rows = [count for count in (entry.get("num_samples"), limit) if count is not None]
    cut = f"@[0:{min(rows)}]" if rows else ""
    if "hf_hub_url" in entry:
        return (hub_name(entry["hf_hub_url"], entry.get("subset"), entry.get("split", "train"), where) + cut,)
    if "file_name" not in entry:
        raise Unlike("it is read by a script or from another hub; write its rows to a file and name that")
    path = Path(folder) / str(entry["file_name"])
    if path.is_dir():
        files = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in DATA_FILES)
        if not files:
            raise Unlike(f"the folder {path} holds no data files; put its files there")
        return tuple(file + cut for file in files)
    return (str(path) + cut,)


def _alpaca(entry: Mapping[str, Any], columns: Mapping[str, str], stage: str) -> dict[str, str]:
    """Where columns are given, those that are not are not read; without, they have their usual names."""
    names = {**_ALPACA, **_SHARED}
    if entry.get("ranking") or stage in ("dpo", "rm"):
        del names["response"]
    return {ours: columns[theirs] for theirs, ours in names.items() if theirs in columns}


def _sharegpt(entry: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    tags = {**_SHAREGPT_TAGS, **(entry.get("tags") or {})}
    is_openai = tags["role_tag"] == "role" and tags["content_tag"] == "content"
    known = _OPENAI_TAGS if is_openai else _SHAREGPT_TAGS
    strange = {tag: value for tag, value in (entry.get("tags") or {}).items() if known.get(tag, value) != value}
    if strange:
        raise Unlike(
            f"it has the tags {strange}; messages are read with role and content (user, assistant) or with from "
            "and value (human, gpt); rename them in the rows"
        )
    messages = columns.get("messages", "conversations")
    shared = {ours: columns[theirs] for theirs, ours in _SHARED.items() if theirs in columns}
    return {"messages" if is_openai else "conversations": messages, **shared}


def _differences(name: str, entry: Mapping[str, Any], columns: Mapping[str, str], stage: str) -> tuple[str, ...]:
    remarks = []
    if entry.get("num_samples") is not None:
        remarks.append(f"{name}: LLaMA-Factory draws num_samples rows at random, here they are the first")
    is_alpaca = entry.get("formatting", "alpaca") == "alpaca" and stage != "pt"
    if is_alpaca and columns and "query" not in columns:
        remarks.append(f"{name}: LLaMA-Factory does not read a column that `columns` leaves out; here `input` is read")
    if entry.get("revision"):
        remarks.append(f"{name}: the newest revision is read, not {entry['revision']}")
    return tuple(remarks)
