"""The names of all settings: what stands at a dotted path, what it takes, and which name is nearest."""

from __future__ import annotations

import difflib
import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from whet.config.run import RunConfig

Path = tuple[str | int, ...]

ENTRY = "NAME"
"""Stands in a path for the name of an entry, in a mapping of sections."""


@dataclass(frozen=True)
class Setting:
    """One setting of the schema, or a section of them."""

    path: str
    field: FieldInfo
    section: type[BaseModel] | None = None
    """The model of what lies beneath, where this is a section or a list of sections."""
    has_entries: bool = False
    """Whether this is a mapping of sections under names of the user's own."""

    @property
    def open(self) -> bool:
        """Whether keys beneath are free: the options of a plugin, the entries of a mapping."""
        if self.section is not None:
            return self.section.model_config.get("extra") == "allow"
        if self.has_entries:
            return False
        return any(get_origin(kind) is dict or kind is dict for kind in members(self.field.annotation))

    @property
    def has_items(self) -> bool:
        """Whether this may be a list, so that a number in a path counts its items."""
        return any(get_origin(kind) is list or kind is list for kind in members(self.field.annotation))

    @property
    def optional(self) -> bool:
        return type(None) in members(self.field.annotation)

    @property
    def may_be_empty(self) -> bool:
        """Whether nothing below its heading leaves it at its defaults; an entry is there because it was named."""
        return self.section is not None and not self.optional and not self.path.endswith(f".{ENTRY}")

    @property
    def shorthand(self) -> str | None:
        """The key that a text in place of the whole section stands for."""
        if self.section is not None:
            return next((key for key in ("use", "path") if key in self.section.model_fields), None)
        return "use" if self.path == "loss" else None


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, without `Annotated`; a single type is its own only alternative."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in members(part))
    return (annotation,)


def _section(annotation: Any, container: Any = list) -> type[BaseModel] | None:
    for kind in members(annotation):
        kind = get_args(kind)[-1] if get_origin(kind) is container else kind
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


@cache
def settings(model: type[BaseModel] = RunConfig) -> Mapping[str, Setting]:
    """Every setting beneath a model by dotted path, sections before what they hold."""
    found: dict[str, Setting] = {}
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        entry = _section(field.annotation, dict) if section is None else None
        found[name] = Setting(name, field, section, has_entries=entry is not None)
        if entry is not None:
            name, section = f"{name}.{ENTRY}", entry
            found[name] = Setting(name, field, section)
        for path, setting in settings(section).items() if section else ():
            found[f"{name}.{path}"] = replace(setting, path=f"{name}.{path}")
    return found


def dotted(path: Iterable[str | int]) -> str:
    return ".".join(map(str, path))


def find(path: Sequence[str | int], model: type[BaseModel] = RunConfig) -> Setting | None:
    """The setting at a path, or None. Indices into lists are looked through; an entry may have any name."""
    setting, name = None, ""
    for part in path:
        if setting is not None and setting.has_items and str(part).isdigit():
            continue
        part = ENTRY if setting is not None and setting.has_entries else part
        name = f"{name}.{part}" if name else str(part)
        setting = settings(model).get(name)
        if setting is None:
            return None
    return setting


def names_near(path: Sequence[str | int], model: type[BaseModel] = RunConfig) -> list[str]:
    """The settings that a misspelt path can have meant: those of an entry only beneath it, under its name."""
    plain = [name for name in settings(model) if ENTRY not in name.split(".")]
    for depth in range(1, len(path)):
        holder = find(path[:depth], model)
        if holder is not None and holder.has_entries:
            entry = dotted(path[: depth + 1])
            beneath = f"{holder.path}.{ENTRY}."
            plain += [f"{entry}.{name.removeprefix(beneath)}" for name in settings(model) if name.startswith(beneath)]
    return plain


def is_open(path: Sequence[str | int], model: type[BaseModel] = RunConfig) -> bool:
    """Whether a path lies where keys are free, so that the schema cannot tell whether it exists."""
    ancestors = (find(path[:depth], model) for depth in range(1, len(path)))
    return any(ancestor is not None and ancestor.open for ancestor in ancestors)


def takes_bool(annotation: Any) -> bool:
    return any(
        kind in (bool, Any) or (get_origin(kind) is Literal and True in get_args(kind)) for kind in members(annotation)
    )


def is_mistaken_bool(value: object, annotation: Any) -> bool:
    """Whether true or false stands where a number belongs; pydantic would read it as 1 or 0."""
    kinds = members(annotation)
    return isinstance(value, bool) and not takes_bool(annotation) and (int in kinds or float in kinds)


_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_PLURAL = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}


def expects(annotation: Any) -> str:
    """What a type takes, in words: `a whole number or a list of whole numbers`."""
    words = []
    for kind in members(annotation):
        origin, args = get_origin(kind), get_args(kind)
        if origin is Literal:
            words.append("one of " + any_of(map(str, args)))
        elif kind is list or origin is list:
            words.append("a list" + (f" of {_PLURAL.get(args[0], 'mappings')}" if args else ""))
        elif kind is dict or origin is dict or (isinstance(kind, type) and issubclass(kind, BaseModel)):
            words.append("a mapping")
        else:
            words.append(_PLAIN.get(kind) or getattr(kind, "__name__", str(kind)))
    return any_of(words)


def any_of(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def show(value: object, limit: int = 60) -> str:
    """A value as it would be written in YAML, cut to one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The names most like a misspelt one, at most three and equally near; none when nothing is near.

    Full dotted names and last parts are compared, so `epochs` finds `train.epochs`.
    """

    def likeness(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    wanted = name.replace("-", "_").lower()
    scored: list[tuple[float, float, str]] = []
    for candidate in names:
        whole = likeness(wanted, candidate.lower())
        last = likeness(wanted.rpartition(".")[2], candidate.lower().rpartition(".")[2])
        # A last part alone says less: `eval.batch_size` is nearer to `evl.batch_size` than `train.batch_size`.
        scored.append((max(whole, last), whole, candidate))
    best = max(scored, default=(0.0, 0.0, ""))
    if best[0] < 0.6:
        return []
    if "." in wanted:
        return [best[2]]
    return [candidate for likeness, _, candidate in sorted(scored, reverse=True) if likeness == best[0]][:3]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean train.epochs?`, or nothing."""
    near = nearest(name, names)
    return f"; did you mean {any_of(near)}?" if near else ""


def unique_names(names: Sequence[str]) -> list[str]:
    """Names with a number after each repetition: math, exact, math-2."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return result
