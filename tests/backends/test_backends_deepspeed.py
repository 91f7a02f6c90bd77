"""The deepspeed backend beside its training, which tests/contract holds against `local`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from whet.backends import deepspeed
from whet.errors import ConfigError
from whet.models.tiny import make_tiny

ROOT = Path(__file__).resolve().parents[2]


def test_a_package_that_is_not_installed_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"deepspeed is not installed; install it .*\[deepspeed\].* set backend\.use"):
        deepspeed._library(torch.device("cpu"))


def test_buckets_hold_all_weights_in_order_and_little_more_than_their_share(monkeypatch):
    monkeypatch.setattr(deepspeed, "BUCKET_BYTES", 100)
    named = [(str(size), torch.zeros(size)) for size in (10, 10, 10, 60, 1, 24, 1)]
    buckets = [[name for name, _ in bucket] for bucket in deepspeed._buckets(named)]
    assert buckets == [["10", "10"], ["10"], ["60"], ["1", "24"], ["1"]]


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_divided_models_that_are_frozen_teach_and_are_saved_and_nothing_is_made_of_infinity(tiny_qwen: Path, tmp_path):
    """Frozen models are saved, moved and loaded; a student reads its teacher's head; an adapter is turned off; a
    gradient that is not finite changes no weight. The claims are in `deepspeed_alone.py`."""
    teacher = make_tiny(tmp_path / "teacher", seed=5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.deepspeed_alone", str(tiny_qwen), str(teacher), str(tmp_path)],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
