"""What every engine does, held against those in this process. A new one joins by a factory in ENGINES."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_contract import *  # noqa: F403
from engine_contract import END
from whet.engines.local.engine import LocalEngine
from whet.engines.local.pages import Paging
from whet.engines.protocol import Engine


def local(folder: Path, cache: str | Paging = "auto") -> Engine:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return LocalEngine(model, tokenizer, stop_token_ids=[END], max_concurrent=4, timeout_s=60, cache=cache)


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "local": local,
    "local in pages": partial(local, cache=Paging(page=8)),
}
"""Each makes an engine that serves the model in a folder, stops at END, and takes a version to publish."""


@pytest.fixture(scope="module")
def served(tiny_qwen: Path) -> Path:
    return tiny_qwen


@pytest.fixture(params=ENGINES)
async def engine(request: pytest.FixtureRequest, served: Path) -> AsyncIterator[Engine]:
    engine = ENGINES[request.param](served)
    yield engine
    await engine.close()
