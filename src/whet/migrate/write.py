"""What an import says: the configuration as YAML with where each setting came from, and the findings in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from whet.config.names import find, show
from whet.config.run import RunConfig
from whet.migrate.build import Imported
from whet.migrate.draft import Left


def configuration(imported: Imported) -> str:
    """The configuration as YAML. Behind each setting stands where it came from, at the end what was left out."""
    checked = imported.config.model_dump() if imported.config is not None else {}
    lines = [f"# From {imported.file} ({imported.tool}).", *_section(imported.values, (), imported, checked)]
    for problem in imported.missing:
        lines.append(f"# Fill in: {problem.text}")
    for title, entries in _chapters(imported):
        lines += ["", f"# {title}:", *(f"#   {line}" for entry in entries for line in entry.splitlines())]
    return "\n".join(lines) + "\n"


def report(imported: Imported, out: str | None) -> str:
    """The findings in words: what to fill in, what has no counterpart, what is idle, what to look at."""
    command = f"whet {imported.method} {out or 'OUT.yaml'}"
    ready = f"run it with {command}" if not imported.missing else "fill in what is missing first"
    lines = [f"{imported.file} ({imported.tool}) -> {out or 'standard output'}: method {imported.method}; {ready}"]
    if imported.missing:
        lines += ["", "to fill in:", *(f"  {problem.text}" for problem in imported.missing)]
    for title, entries in _chapters(imported):
        lines += ["", f"{title}:", *(f"  {entry}" for entry in entries)]
    return "\n".join(lines) + "\n"


def _chapters(imported: Imported) -> Iterator[tuple[str, list[str]]]:
    for title, entries in (
        ("without a counterpart", _told(imported.lost)),
        ("without effect here", _told(imported.idle)),
        ("to look at", imported.remarks),
    ):
        if entries:
            yield title, list(dict.fromkeys(entries))


def _told(entries: Sequence[Left]) -> list[str]:
    return [f"{one.name}{_value(one)} ({_place(one.source, one.name)}): {one.why}" for one in entries]


def _value(one: Left) -> str:
    """What was written, unless it may be a secret: what is written here is passed on."""
    is_secret = one.name.endswith(("_key", "_token", "password"))
    return "" if one.value is None or is_secret else f": {show(one.value)}"


def _place(source: str, name: str) -> str:
    return source.removeprefix(f"{name} in ")


def _section(values: dict[str, Any], at: tuple[str, ...], imported: Imported, checked: Any) -> Iterator[str]:
    """The lines of a mapping of settings, in the order of the schema."""
    section = find(at)
    model = RunConfig if not at else section.section if section is not None else None
    order = list(model.model_fields) if model is not None else []
    indent = "  " * len(at)
    for name in sorted(values, key=lambda one: order.index(one) if one in order else len(order)):
        value, path = values[name], (*at, name)
        inner = checked.get(name, value) if isinstance(checked, dict) else value
        setting = find(path)
        is_section = setting is not None and (setting.section is not None or setting.open)
        if isinstance(value, dict) and value and is_section:
            yield f"{indent}{name}:"
            yield from _section(value, path, imported, inner if isinstance(inner, dict) else {})
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield f"{indent}{name}:{_comment(path, imported)}"
            yield from (f"{indent}  - {_flow(item)}" for item in value)
        else:
            # As the schema reads it: `1e-6` as a number, an adapter that is off as null.
            plain = inner if not isinstance(inner, dict) else value
            yield f"{indent}{name}: {_flow(plain)}{_comment(path, imported)}"


def _flow(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(path: tuple[str, ...], imported: Imported) -> str:
    beneath = (one for inner, one in imported.sources.items() if inner[: len(path)] == path)
    source = imported.sources.get(path) or next(beneath, None)
    if source is None:
        return ""
    source = source.replace(f" in {imported.file}, line ", ", line ").replace(f"{imported.file}, line", "line")
    return f"  # {default}" if source.endswith(default := f"{imported.tool}'s default") else f"  # {source}"
