"""What is wrong with a configuration, in plain words: pydantic's errors rephrased, all told at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from whet.config.names import Path, Setting, did_you_mean, dotted, expects, find, members, show
from whet.errors import ConfigError

Details = Mapping[str, Any]

_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}

_WRONG_TYPE = ("_type", "_parsing", "_from_float", "literal_error", "is_instance_of")
"""How pydantic's names of errors end where the type alone is wrong."""


@dataclass(frozen=True)
class Problem:
    """One violation: the setting it is about, and the whole sentence."""

    path: Path
    text: str


def refuse(texts: Sequence[str], subject: str = "the configuration") -> None:
    """Raise one ConfigError that tells all violations; do nothing when there are none."""
    if len(texts) == 1:
        raise ConfigError(texts[0])
    if texts:
        raise ConfigError("\n  - ".join([f"{len(texts)} problems in {subject}:", *texts]))


def problems_of(error: ValidationError, raw: object, model: type[BaseModel], prefix: str = "") -> list[Problem]:
    """The violations behind a pydantic error, one per setting, in the order of the schema.

    `raw` is what was validated. `prefix` stands before every name, as in `reward.`.
    """
    groups: dict[Path, list[Details]] = {}
    for details in error.errors():
        groups.setdefault(_setting_path(_path(details, raw), model), []).append(details)
    # A union answers for each alternative; what was found inside the matching one says more.
    inner = [path for path in groups if not any(_beneath(other, path) for other in groups)]
    return [Problem(path, prefix + _sentence(path, groups[path], raw, model)) for path in inner]


def _beneath(path: Path, above: Path) -> bool:
    return len(path) > len(above) and path[: len(above)] == above


def _path(details: Details, raw: Any) -> Path:
    """The place of an error in what was written: its location without the names of union alternatives."""
    path: list[str | int] = []
    for part in details["loc"]:
        is_key = isinstance(raw, dict) and part in raw
        is_index = isinstance(raw, list) and isinstance(part, int)
        if is_key or is_index:
            path.append(part)
            raw = raw[part]
    if details["type"] == "missing":
        path.append(details["loc"][-1])
    return tuple(path)


def _setting_path(path: Path, model: type[BaseModel]) -> Path:
    """The longest part of a path that is a setting or an entry of a mapping; the whole path where nothing is."""
    for depth in range(len(path), 0, -1):
        setting = find(path[:depth], model)
        is_item = isinstance(path[depth - 1], int)
        if setting is not None and not (is_item and setting.section is None):
            return path[: depth + 1] if setting.open else path[:depth]
    return path


def _sentence(path: Path, errors: Iterable[Details], raw: Any, model: type[BaseModel]) -> str:
    name, kinds = dotted(path), {details["type"]: details for details in errors}
    setting = find(path, model)
    if "missing" in kinds:
        return f"{name} is missing{_meaning(setting)}"
    for part in path:
        raw = raw[part]
    if "extra_forbidden" in kinds:
        return f"{name} is not an option (value {show(raw)}){did_you_mean(name, model.model_fields)}"
    for kind, (words, key) in _LIMITS.items():
        if kind in kinds:
            limit = kinds[kind]["ctx"][key]
            shown = f"{limit:g}" if isinstance(limit, float) else limit
            return f"{name} must be {words} {shown}, got {show(raw)}{_switched_off(raw, setting)}"
    if "finite_number" in kinds:
        return f"{name} must be a finite number, got {show(raw)}"
    if "value_error" in kinds:  # raised by a validator of ours, which says it all
        return f"{name}: {kinds['value_error']['msg'].removeprefix('Value error, ')}"
    if not any(kind.endswith(_WRONG_TYPE) for kind in kinds):
        message = next(iter(kinds.values()))["msg"]
        return f"{name}: {message[:1].lower()}{message[1:]}, got {show(raw)}"
    annotation = setting.field.annotation if setting is not None else _entry(path, model)
    return f"{name} must be {expects(annotation)}, got {show(raw)}{_hint(raw, annotation)}"


def _entry(path: Path, model: type[BaseModel]) -> Any:
    """The type of an entry of a mapping."""
    holder = find(path[:-1], model)
    assert holder is not None, f"{dotted(path)} is neither a setting nor an entry of one"
    return next(get_args(kind)[1] for kind in members(holder.field.annotation) if get_origin(kind) is dict)


def _meaning(setting: Setting | None) -> str:
    words = setting.field.description if setting is not None else None
    return f" ({words[:1].lower()}{words[1:].rstrip('.')})" if words else ""


def _switched_off(value: object, setting: Setting | None) -> str:
    """How something that is done every so often is not done at all."""
    if setting is None or value != 0 or setting.field.default is not None:
        return ""
    return "; leave it out to do without" if setting.path.rpartition(".")[2].startswith("every_") else ""


def _hint(value: object, annotation: Any) -> str:
    kinds = members(annotation)
    if str in kinds and not isinstance(value, str | list | dict | type(None)):
        return "; put it in quotes"
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return did_you_mean(value, choices) if isinstance(value, str) else ""
