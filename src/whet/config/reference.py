"""Writes docs/configuration.md and docs/config.schema.json from the schema: `python -m whet.config.reference [docs]`."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from whet.config.aliases import ALIASES, PREFIXES
from whet.config.conversions import Alias
from whet.config.names import Setting, members, settings, show
from whet.config.run import RunConfig

INTRODUCTION = """\
# Configuration

This page is generated from the schema (`python -m whet.config.reference`); [config.schema.json](config.schema.json)
is the same for editors.

A run is described by a YAML file and flags, of which flags win:

```bash
whet sft run.yaml --optim.lr 1e-6 --data.train rows.jsonl
```

```yaml
# run.yaml
model: Qwen/Qwen3-0.6B
data:
  train: train.jsonl
  columns: {prompt: question, response: answer}
optim: {lr: 1e-5, schedule: cosine}
```

- A flag is `--section.key value` or `--section.key=value`; dashes and underscores in names are alike. A value is
  read as YAML where the setting takes that, as in `--rollout.stop '["###"]'`, and as plain text elsewhere.
- A flag alone means true, as in `--eval.at_start`. There is no `--no-...`: write `--log.progress false`.
- A text in place of a section stands for its `use` or its `path`: `--reward math`, `model: Qwen/Qwen3-0.6B`.
- A heading with nothing below it leaves that section at its defaults. `null` is no value.
- Within the file, and within the flags, a setting may be given once, under one name.
- Keys beside `use` are options of what is chosen. They are checked against its own parameters.
- All mistakes are reported at once, each with the value, where it was written and the nearest name.
- The resolved configuration is saved with the run, and is itself a configuration.
"""

ALIAS_INTRODUCTION = """\
## Names from other tools

These names are understood at the top of the file and as flags, and, where all that they set lies in one section,
inside that section. A name that has no effect here is accepted with a note; a refused one stops the run with the reason.
"""


def markdown() -> str:
    """The page about every setting and every name of other tools."""
    parts = [INTRODUCTION, _section("The run", RunConfig, "")]
    for path, setting in settings().items():
        if setting.section is not None:
            parts.append(_section(f"`{path}`", setting.section, f"{path}.", setting))
    parts.append(ALIAS_INTRODUCTION)
    parts += [_aliases(origin) for origin in dict.fromkeys(alias.origin for alias in _sorted())]
    return "\n".join(parts)


def json_schema() -> str:
    """The schema as JSON Schema, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def write(folder: Path) -> list[Path]:
    """Write both files into a folder, which is made if need be; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / "configuration.md": markdown(), folder / "config.schema.json": json_schema()}
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return list(files)


def _section(title: str, model: type[BaseModel], prefix: str, setting: Setting | None = None) -> str:
    words = [inspect.cleandoc(model.__doc__ or "")]
    if setting is not None and setting.field.description:
        words.append(f"As `{setting.path}`: {_line(setting.field.description)}")
    if setting is not None and setting.has_items:
        words.append("May be a list of such mappings; `.0` in a flag is the first.")
    if setting is not None and setting.optional:
        words.append("Off unless given.")
    rows = [_row(prefix + name, field) for name, field in model.model_fields.items() if not _is_section(prefix + name)]
    table = _table(("setting", "type", "default", "meaning", "also known as"), rows)
    if setting is not None and setting.open:
        words.append("Further keys are options of what `use` names.")
    return f"## {title}\n\n" + "\n\n".join(words) + f"\n\n{table}"


def _is_section(path: str) -> bool:
    return settings()[path].section is not None


def _row(path: str, field: FieldInfo) -> tuple[str, ...]:
    default = "required" if field.is_required() else f"`{show(field.get_default(call_default_factory=True))}`"
    names = [f"`{alias.name}`" for alias in _sorted() if path in alias.targets]
    return f"`{path}`", _type(field), default, _line(field.description or ""), ", ".join(names)


_LIMITS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


def _type(field: FieldInfo) -> str:
    limits = [f"{sign} {getattr(one, key):g}" for one in field.metadata for key, sign in _LIMITS if hasattr(one, key)]
    return " or ".join(_type_name(kind) for kind in members(field.annotation)) + (
        f", {', '.join(limits)}" * bool(limits)
    )


def _type_name(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in args)
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if kind is dict or origin is dict:
        return "mapping"
    return {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}[kind]


def _line(text: str) -> str:
    return " ".join(text.split())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _sorted() -> list[Alias]:
    families = [Alias(f"{one.name}*", one.origin, one.effect, one.convert, note=one.note) for one in PREFIXES.values()]
    return sorted([*ALIASES.values(), *families], key=lambda alias: (alias.origin, alias.name))


def _aliases(origin: str) -> str:
    rows = []
    for alias in _sorted():
        if alias.origin == origin:
            becomes = ", ".join(f"`{target}`" for target in alias.targets) or {"sets": "a check"}.get(
                alias.effect, alias.effect
            )
            rows.append((f"`{alias.name}`", becomes, alias.note))
    return f"### {origin}\n\n" + _table(("name", "becomes", "how, or why"), rows)


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
