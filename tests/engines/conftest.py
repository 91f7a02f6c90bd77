"""Servers that the tests of engines share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server_engines import Place, double_python


@pytest.fixture(scope="session")
def sglang_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python whose SGLang is the stand-in."""
    return double_python(tmp_path_factory.mktemp("python"))


@pytest.fixture(scope="session")
def sglang_server(sglang_python: str, tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One SGLang server for all tests that only ask it something: a real one where WHET_TEST_SGLANG_URL says so."""
    url, model = os.environ.get("WHET_TEST_SGLANG_URL"), os.environ.get("WHET_TEST_SGLANG_MODEL")
    if url is not None:
        yield Place("sglang", url, Path(model) if model else tiny_qwen)
        return
    with Place.started("sglang", sglang_python, tiny_qwen, tmp_path_factory.mktemp("sglang")) as place:
        yield place
