"""From what was written to one tree of values: names are understood, later layers override earlier ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from whet.config.aliases import ALIASES, alias_of
from whet.config.conversions import Alias, Refused, Unless
from whet.config.names import Path, any_of, dotted, expects, find, is_mistaken_bool, is_open, names_near, nearest, show
from whet.config.written import Written, switch_hint


@dataclass(frozen=True)
class Value:
    """One setting of ours and its value, from one place."""

    path: Path
    value: Any
    source: str
    inner: Mapping[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Foreign:
    """A name of another tool as it was written."""

    alias: Alias
    name: str
    value: Any
    source: str


@dataclass
class Combined:
    """All layers as one tree, with where each value came from and what was wrong on the way."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[Path, str] = field(default_factory=dict)
    foreign: list[Foreign] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def source(self, path: Path) -> str | None:
        """Where a path was written, or the nearest thing that holds it, or the first thing in it."""
        for depth in range(len(path), 0, -1):
            if path[:depth] in self.sources:
                return self.sources[path[:depth]]
        return next((source for inner, source in self.sources.items() if inner[: len(path)] == path), None)


def combine(layers: Sequence[Sequence[Written]], method: str) -> Combined:
    """Put layers on top of each other, the last on top. What is wrong is collected, not raised.

    `method` is that of the run: some names of other tools mean different things to different methods.
    """
    result = Combined()
    strong: list[list[Value]] = []
    weak: list[Value] = []
    for number, layer in enumerate(layers):
        # A name given again later replaces the earlier one before either is converted.
        again = {written.path for later in layers[number + 1 :] for written in later}
        values: list[Value] = []
        for written in layer:
            if written.path in again and alias_of(written.path) is not None:
                continue
            for value in _understood(written, method, result):
                if isinstance(value.value, Unless):
                    weak.append(Value(value.path, value.value.value, value.source))
                else:
                    values.append(value)
        result.problems += _clashes(values)
        strong.append(values)
    for values in [weak, *strong]:
        for value in values:
            _put(value, result)
    return result


def _understood(written: Written, method: str, result: Combined) -> list[Value]:
    """The settings that a written name stands for; problems and foreign names are noted in `result`."""
    name = dotted(written.path)
    setting = find(written.path)
    if setting is not None or is_open(written.path):
        if setting is not None and is_mistaken_bool(written.value, setting.field.annotation):
            wanted = expects(setting.field.annotation)
            result.problems.append(f"{name} must be {wanted}, got {show(written.value)} (from {written.source})")
            return []
        return [Value(written.path, written.value, written.source, written.inner)]
    alias = alias_of(written.path)
    if alias is None:
        result.problems.append(
            f"{name} is not a setting (value {show(written.value)}, from {written.source}){suggestion(written.path)}"
        )
        return []
    source = written.source if written.source.startswith("--") else f"{name} in {written.source}"
    try:
        converted = alias.convert(written.value, method)
    except Refused as reason:
        result.problems.append(f"{name} is {show(written.value)} (from {written.source}), but it {reason}")
        return []
    result.foreign.append(Foreign(alias, name, written.value, written.source))
    values = [Value(tuple(path.split(".")), value, source) for path, value in converted.items()]
    return [value for value in values if not _is_mistaken(value, name, result)]


def _is_mistaken(value: Value, name: str, result: Combined) -> bool:
    setting = find(value.path)
    mistaken = setting is not None and is_mistaken_bool(value.value, setting.field.annotation)
    if mistaken and setting is not None:
        wanted = expects(setting.field.annotation)
        result.problems.append(f"{name} must be {wanted}, got {show(value.value)} (from {value.source})")
    return mistaken


def suggestion(path: Path) -> str:
    """`; did you mean optim.lr?`: the nearest setting or name of another tool."""
    if hint := switch_hint(path):
        return hint
    # An alias that is the last part of its own setting would hide the others of that name.
    usable = {
        name: alias
        for name, alias in ALIASES.items()
        if alias.effect == "sets" and not any(target.endswith(f".{name}") for target in alias.targets)
    }
    near = nearest(dotted(path), [*names_near(path), *usable])
    shown = [f"{name} ({any_of(usable[name].targets)})" if name in usable else name for name in near]
    return f"; did you mean {any_of(shown)}?" if shown else "; docs/configuration.md lists all settings"


def _clashes(values: Sequence[Value]) -> list[str]:
    """Settings that one layer gives twice, with different values or as a part and a whole."""
    problems = []
    first: dict[Path, Value] = {}
    for value in values:
        for path, other in first.items():
            shorter, longer = sorted((other, value), key=lambda one: len(one.path))
            is_same = path == value.path and other.value == value.value
            is_heading = len(shorter.path) < len(longer.path) and shorter.value == {}
            overlap = longer.path[: len(shorter.path)] == shorter.path
            if overlap and not is_same and not is_heading:
                problems.append(
                    f"{dotted(shorter.path)} is given twice: {show(other.value)} (from {other.source}) and "
                    f"{show(value.value)} (from {value.source}); keep one"
                )
        first.setdefault(value.path, value)
    return problems


def _put(value: Value, result: Combined) -> None:
    """Set one value in the tree, replacing what stood there and beneath."""
    *above, last = value.path
    node: Any = result.values
    for depth, part in enumerate(above):
        child = _child(node, part)
        if not isinstance(child, dict | list):
            child = {}
            if not _assign(node, part, child):
                return result.problems.append(_no_item(value, depth, node))
        node = child
    is_heading = value.value == {} and isinstance(_child(node, last), dict)
    if not is_heading and not _assign(node, last, copy.deepcopy(value.value)):
        return result.problems.append(_no_item(value, len(above), node))
    depth = len(value.path)
    if not is_heading:
        for path in [path for path in result.sources if path[:depth] == value.path]:
            del result.sources[path]
    result.sources[value.path] = value.source
    result.sources |= {(*value.path, *inner): source for inner, source in value.inner.items()}
    return None


def _child(node: Any, part: str | int) -> Any:
    if isinstance(node, list):
        return node[int(part)] if str(part).isdigit() and int(part) < len(node) else None
    return node.get(part)


def _assign(node: Any, part: str | int, value: Any) -> bool:
    if isinstance(node, dict):
        node[part] = value
        return True
    if str(part).isdigit() and int(part) < len(node):
        node[int(part)] = value
        return True
    return False


def _no_item(value: Value, depth: int, items: Sequence[object]) -> str:
    holder = dotted(value.path[:depth])
    return (
        f"{dotted(value.path)} (from {value.source}) cannot be set: {holder} is a list of {len(items)}; "
        f"write {holder}.0 to {holder}.{len(items) - 1}, or the whole list"
    )
