"""The claims of the engine contract, on an SGLang server: a stand-in, or a real one at WHET_TEST_SGLANG_URL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine_contract import *  # noqa: F403
from server_engines import Place, Trainer, engine_of
from whet.engines.protocol import Engine


@pytest.fixture(scope="module")
def served(sglang_server: Place) -> Path:
    return sglang_server.model


@pytest.fixture
async def engine(sglang_server: Place, tmp_path: Path) -> AsyncIterator[Engine]:
    trainer = Trainer(sglang_server.model)
    engine = engine_of("sglang", trainer, tmp_path, address=sglang_server.address)
    await engine.update_weights(trainer.snapshot(0))  # whatever an earlier test has left there
    yield engine
    await engine.close()
