"""Device and arithmetic: what is there, and which precision is fast without being wrong."""

from __future__ import annotations

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


def device_of(config: BackendConfig) -> tuple[torch.device, torch.dtype | None]:
    """The device, and the type of autocast (None: float32 throughout), without applying anything.

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
    return device, _DTYPES[precision]


def choose(config: BackendConfig) -> Arithmetic:
    """Resolve `auto` settings and apply threads and matrix precision to this process.

    Raises ConfigError when a GPU is asked for and there is none, or for fp16 on a CPU.
    """
    device, autocast = device_of(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    # On CPUs `medium` goes through oneDNN, which compiles a kernel (1 ms, 1 MB) for every new shape; batches of
    # ragged sequences bring new shapes at every step, so that what it gains on large products is lost again.
    matmul = "highest" if config.matmul == "auto" else config.matmul
    torch.set_float32_matmul_precision(matmul)
    return Arithmetic(device, autocast, matmul)
