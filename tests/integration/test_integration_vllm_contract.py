"""The claims of the engine contract, on a real vLLM server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine_contract import *  # noqa: F403
from server_engines import Place, Trainer, engine_of
from whet.engines.protocol import Engine


@pytest.fixture(scope="module")
def served(served_model: Path) -> Path:
    return served_model


@pytest.fixture
async def engine(vllm_server: Place, tmp_path: Path) -> AsyncIterator[Engine]:
    trainer = Trainer(vllm_server.model)
    engine = engine_of("vllm", trainer, tmp_path, address=vllm_server.address)
    await engine.update_weights(trainer.snapshot(0))  # whatever an earlier test has left there
    yield engine
    await engine.close()
