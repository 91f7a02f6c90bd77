"""The generated pages: up to date, complete, and a schema that accepts what the loader accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from whet.config.aliases import ALIASES, PREFIXES
from whet.config.names import settings
from whet.config.reference import json_schema, markdown, summary, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name,text", [("configuration.md", markdown()), ("config.schema.json", json_schema())])
def test_the_page_in_docs_is_up_to_date(name: str, text: str):
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == text, f"docs/{name} is old; run: python -m whet.config.reference"


def test_every_setting_has_a_meaning_a_type_and_a_default():
    lines = markdown().splitlines()
    for path, setting in settings().items():
        if setting.section is None:
            (line,) = [line for line in lines if line.startswith(f"| `{path}` | ")]
            _, _, type_, default, meaning, *_ = (cell.strip() for cell in line.replace("\\|", "").split("|"))
            assert type_ and default and len(meaning) > 5, line
        else:
            assert f"## `{path}`" in lines


def test_every_name_of_other_tools_stands_in_the_page_with_what_becomes_of_it():
    page = markdown()
    for name, alias in ALIASES.items():
        assert f"| `{name}` | " in page
        assert alias.targets or alias.note, f"{name} is without effect and does not say why"
    assert all(f"| `{prefix}*` | {family.effect} | " in page for prefix, family in PREFIXES.items())


def test_the_files_are_written_where_asked(tmp_path: Path):
    assert write(tmp_path / "new") == [tmp_path / "new" / "configuration.md", tmp_path / "new" / "config.schema.json"]
    schema = json.loads((tmp_path / "new" / "config.schema.json").read_text(encoding="utf-8"))
    assert schema["required"] == ["model"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["OptimConfig"]["properties"]["lr"]["description"] == "Peak learning rate."


def test_the_summary_names_every_setting_once_with_its_default():
    lines = summary().splitlines()
    assert len(lines) == sum(setting.section is None for setting in settings().values())
    assert "  --optim.lr (2e-05)  Peak learning rate" in lines
    assert any(line.startswith("  --model.path (required)  ") for line in lines)
