"""What docs/moving.md shows is what `whet import` makes of what it shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from whet import cli
from whet.config.loader import load

PAGE = Path(__file__).resolve().parents[2] / "docs" / "moving.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
NAMED = re.compile(r"# ([\w.-]+)\n(.*)", re.S)


def shown() -> dict[str, str]:
    """The files that the page shows, by their name."""
    files = {}
    for language, code in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language == "json":
            files["data/dataset_info.json"] = code
        elif match := NAMED.match(code):
            files[match[1]] = code if match[1].endswith(".sh") else match[2]
    return files


def commands() -> list[list[str]]:
    blocks = [code for language, code in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if language == "bash"]
    return [shlex.split(line)[1:] for line in "".join(blocks).splitlines() if line.startswith("whet import")]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[1])
def test_the_page_shows_what_the_import_writes(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    files = shown()
    out = command[command.index("-o") + 1]
    for name, text in files.items():
        if name != out:
            Path(name).write_text(text, encoding="utf-8")
    assert cli.main(command) == 0
    assert Path(out).read_text(encoding="utf-8").strip() == files[out].strip()
    method = re.search(r"whet (\S+) " + re.escape(out), capsys.readouterr().out)
    assert method is not None
    assert load(method[1], out, []).config.model.path == "Qwen/Qwen3-0.6B"


def test_the_page_shows_all_three_tools():
    assert [command[1] for command in commands()] == ["trl", "llamafactory", "slime"]
