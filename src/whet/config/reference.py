"""The pages about the configuration, written from the schema: `python -m whet.config.reference [docs]`."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from whet.config.aliases import ALIASES, ORIGINS, PREFIXES
from whet.config.base import Plugin
from whet.config.names import Setting, expects, settings, show
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
model: {path: Qwen/Qwen3-0.6B}
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

These names are understood as flags, at the top of the file, and inside the section that holds all that they set.
A name that has no effect here is accepted with a note; one that is refused stops the run and says why.
"""


def markdown() -> str:
    """The page about every setting and every name of other tools."""
    parts = [INTRODUCTION, _section("The run", RunConfig, "")]
    for path, setting in settings().items():
        if setting.section is not None:
            parts.append(_section(f"`{path}`", setting.section, f"{path}.", setting))
    parts.append(ALIAS_INTRODUCTION)
    parts += [_aliases(origin) for origin in ORIGINS]
    return "\n".join(parts)


def summary() -> str:
    """Every setting as a flag, with its default and the first sentence about it: what `--help` prints."""
    lines = []
    for path, setting in settings().items():
        if setting.section is None:
            field = setting.field
            default = "required" if field.is_required() else show(field.get_default(call_default_factory=True))
            first, _, _ = _line(field.description or "").partition(". ")
            lines.append(f"  --{path} ({default})  {first.rstrip('.')}")
    return "\n".join(lines)


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
    words = [] if model is Plugin else [inspect.cleandoc(model.__doc__ or "")]
    if setting is not None:
        words.insert(0, setting.field.description or "")
        words.append("May be a list of such mappings; `.0` in a flag is the first." if setting.has_items else "")
        words.append("Further keys are options of what `use` names." if setting.open else "")
        words.append("Off unless given." if setting.optional else "")
    rows = [_row(prefix + name, field) for name, field in model.model_fields.items() if not _is_section(prefix + name)]
    table = _table(("setting", "type", "default", "meaning", "also known as"), rows)
    return "\n\n".join([f"## {title}", *filter(None, words), table])


def _is_section(path: str) -> bool:
    return settings()[path].section is not None


def _row(path: str, field: FieldInfo) -> tuple[str, ...]:
    default = "required" if field.is_required() else f"`{show(field.get_default(call_default_factory=True))}`"
    names = [f"`{alias.name}`" for alias in ALIASES.values() if path in alias.targets]
    return f"`{path}`", _type(field), default, _line(field.description or ""), ", ".join(names)


_LIMITS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


def _type(field: FieldInfo) -> str:
    limits = [f"{sign} {getattr(one, key):g}" for one in field.metadata for key, sign in _LIMITS if hasattr(one, key)]
    return expects(field.annotation) + (f" ({', '.join(limits)})" if limits else "")


def _line(text: str) -> str:
    return " ".join(text.split())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _aliases(origin: str) -> str:
    families = [replace(family, name=f"{family.name}*") for family in PREFIXES.values()]
    mine = sorted((one for one in [*ALIASES.values(), *families] if origin in one.origins), key=lambda one: one.name)
    rows = [(f"`{one.name}`", ", ".join(f"`{path}`" for path in one.targets) or one.effect, one.note) for one in mine]
    return f"### {origin}\n\n" + _table(("name", "becomes", "how, or why"), rows)


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
