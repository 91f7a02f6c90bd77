"""Device and arithmetic: what is there, and which precision is fast without being wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from whet.config.backend import BackendConfig
from whet.errors import ConfigError

_DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Arithmetic:
    """Where and how to compute. `autocast` is None for float32 throughout."""

    device: torch.device
    autocast: torch.dtype | None
    matmul: str

    def context(self) -> torch.autocast:
        """The autocast context of every forward pass."""
        return torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)


def choose(config: BackendConfig) -> Arithmetic:
    """Resolve `auto` settings and apply threads and matrix precision to this process.

    Raises ConfigError when a GPU is asked for and there is none, or for fp16 on a CPU.
    """
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigError("backend.device is cuda, but PyTorch sees no GPU; use cpu or auto, or install a CUDA build")
    device = torch.device("cuda" if cuda and config.device != "cpu" else "cpu")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("backend.precision is fp16, which is unusably slow on a CPU; use bf16 or float32")
    if config.threads:
        torch.set_num_threads(config.threads)
    matmul = _choose_matmul(device) if config.matmul == "auto" else config.matmul
    torch.set_float32_matmul_precision(matmul)
    return Arithmetic(device, _DTYPES[precision], matmul)


def _choose_matmul(device: torch.device, size: int = 512) -> str:
    """The fastest precision of float32 products whose error stays within four times float32's own.

    On some CPUs `medium` is up to twice as fast at the accuracy of float32; on others it is bf16 in disguise.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    exact = a.double() @ b.double()
    errors, seconds = {}, {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        errors[precision] = float(((a @ b).double() - exact).abs().max())
        seconds[precision] = min(_timed(a, b) for _ in range(3))
    accurate = errors["medium"] <= 4 * errors["highest"]
    return "medium" if accurate and seconds["medium"] < 0.9 * seconds["highest"] else "highest"


def _timed(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
