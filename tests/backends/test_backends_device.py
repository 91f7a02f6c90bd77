"""Device and arithmetic: what `auto` means, and what is refused."""

from __future__ import annotations

import pytest
import torch

from whet.backends.device import choose
from whet.config.backend import BackendConfig
from whet.errors import ConfigError


@pytest.fixture(autouse=True)
def settings_of_the_process():
    """`choose` sets threads and matrix precision for the process; put them back."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_auto_is_float32_on_a_cpu(no_gpu):
    arithmetic = choose(BackendConfig(matmul="highest"))
    assert (arithmetic.device.type, arithmetic.autocast, arithmetic.matmul) == ("cpu", None, "highest")
    with arithmetic.context():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_bf16_runs_on_a_cpu(no_gpu):
    with choose(BackendConfig(precision="bf16", matmul="highest")).context():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_a_gpu_that_is_not_there_is_refused(no_gpu):
    with pytest.raises(ConfigError, match=r"backend.device is cuda, but PyTorch sees no GPU; use cpu or auto"):
        choose(BackendConfig(device="cuda"))


def test_fp16_on_a_cpu_is_refused(no_gpu):
    with pytest.raises(ConfigError, match=r"backend.precision is fp16, which is unusably slow on a CPU; use bf16"):
        choose(BackendConfig(precision="fp16"))


def test_matrix_precision_and_threads_are_those_of_the_configuration(no_gpu):
    choose(BackendConfig(matmul="medium", threads=2))
    assert torch.get_float32_matmul_precision() == "medium" and torch.get_num_threads() == 2


def test_auto_keeps_the_full_precision_of_matrix_products(no_gpu):
    torch.set_float32_matmul_precision("medium")
    assert choose(BackendConfig()).matmul == torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
def test_auto_is_bf16_on_a_gpu():
    arithmetic = choose(BackendConfig(matmul="highest"))
    assert arithmetic.device.type == "cuda" and arithmetic.autocast == torch.bfloat16
