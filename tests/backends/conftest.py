"""What the tests of backends share: awkward units, and a local backend with exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.awkward_units import awkward_units
from whet.backends.device import Arithmetic
from whet.backends.local import LocalBackend
from whet.config.backend import BackendConfig
from whet.config.optim import OptimConfig
from whet.types import Unit

EXACT = Arithmetic(torch.device("cpu"), None, "highest")


@pytest.fixture(params=["qwen3", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A stock two-layer model, fresh for every test."""
    folder: Path = request.getfixturevalue("tiny_qwen" if request.param == "qwen3" else "tiny_llama")
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def units() -> list[Unit]:
    """Eight units, as awkward as can be."""
    return awkward_units()


@pytest.fixture
def backend_of() -> Callable[..., LocalBackend]:
    """A training backend around a model in float32; settings of `BackendConfig` go by keyword."""

    def make(model, *, attention="tree", arithmetic=EXACT, optim=None, temperature=1.0, **settings) -> LocalBackend:
        config = BackendConfig(**settings)
        optim = optim or OptimConfig(max_grad_norm=0)
        return LocalBackend(model, None, config, arithmetic, optim=optim, attention=attention, temperature=temperature)

    return make
