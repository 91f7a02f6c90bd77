"""Foreign environments that integration tests run against, and models that fit them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server_engines import Place, vllm_python
from whet.models.tiny import make_tiny


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose heads are as wide as vLLM's CPU attention wants them."""
    return make_tiny(tmp_path_factory.mktemp("served") / "model", head_dim=32)


@pytest.fixture(scope="session")
def vllm() -> str:
    """The Python of vLLM's environment."""
    if (python := vllm_python()) is None:
        pytest.skip("no environment with vLLM: run scripts/vllm_env.sh, or set WHET_VLLM_PYTHON to its Python")
    return python


@pytest.fixture(scope="session")
def vllm_server(vllm: str, served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One vLLM server for all tests that only ask it something; with the extension of its workers."""
    with Place.started("vllm", vllm, served_model, tmp_path_factory.mktemp("vllm")) as place:
        yield place


os.environ.setdefault("OMP_NUM_THREADS", "1")
