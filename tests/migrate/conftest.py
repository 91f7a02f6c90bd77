"""What tests of imports share: a file to import, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from imports import Import

from whet.migrate.build import Imported
from whet.migrate.run import import_file


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    """Write `text` to a file in an empty folder and import it from there."""
    monkeypatch.chdir(tmp_path)

    def run(tool: str, text: str, name: str = "config.yaml", **options) -> Imported:
        Path(name).write_text(text, encoding="utf-8")
        return import_file(tool, name, **options)

    return run
