"""What every test shares: one thread, no network, where real data lies, and tiny models made from nothing."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported. One thread gives the same bits on every machine, and is faster on models this small.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A test that would fetch from a hub fails at once instead of hanging.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

from whet.models.tiny import make_tiny

ROOT = Path(__file__).resolve().parent.parent

# So that the processes which tests start find whet, where it is not installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))

torch.set_num_threads(1)
# The same examples on every machine, and no failure because a machine was busy.
settings.register_profile("whet", deadline=None, derandomize=True)
settings.load_profile("whet")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch sees none on this machine")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data files; a test that asks for it is skipped where there is none."""
    folder = Path(os.environ.get("WHET_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set WHET_SHARED_DATA to the folder that holds gsm8k_train.jsonl")
    return folder


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Qwen3 with a byte tokenizer and a chat template. Read it, never write to it."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "qwen3", family="qwen3")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Llama with a byte tokenizer and a chat template. Read it, never write to it."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "llama", family="llama")
