"""Where the embedded engine puts keys and values: in slots, or in pages where a kernel reads them there exactly."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from whet.engines.local.forward import Forward
from whet.engines.local.paged import Reading, kernel_takes, paged_kernel
from whet.engines.local.pages import PAGE, Kernel, Paging
from whet.errors import EngineError
from whet.models import parts

logger = logging.getLogger(__name__)

CACHES = ("auto", "slots", "paged")
TOLERANCE = 0.05
"""Largest difference of two attention outputs over standard normal numbers that rounding to 16 bits explains."""


def paging_for(cache: str | Paging, model: nn.Module, autocast: torch.dtype | None) -> Paging | None:
    """How keys and values lie in pages; None for slots.

    `auto` takes pages on a GPU where the kernel gives what attention over a copy does, for all that the model's layers
    ask, and slots elsewhere. `paged` takes pages in any case, and copies where the kernel cannot serve.
    Raises EngineError for a name that there is not.
    """
    if isinstance(cache, Paging):
        return cache
    if cache not in CACHES:
        raise EngineError(f"cache is {cache!r}, expected one of {', '.join(CACHES)}")
    on_gpu = parts.head(model).weight.device.type == "cuda"
    if cache == "slots" or (cache == "auto" and not on_gpu):
        return None
    reason = why_not(model, autocast, paged_kernel()) if on_gpu else "this is not a GPU"
    if cache == "auto" and reason:
        logger.info("keys and values lie in slots: %s", reason)
        return None
    if reason:
        logger.info("keys and values lie in pages, and are copied to attend to them: %s", reason)
    return Paging(kernel=None if reason else paged_kernel())


def why_not(model: nn.Module, autocast: torch.dtype | None, kernel: Kernel | None) -> str | None:
    """What keeps the kernel from serving this model; None: nothing."""
    if kernel is None:
        return "this PyTorch has no attention over pages; it comes with PyTorch 2.13"
    forward, trial = Forward(model, max_rows=1, autocast=autocast), _Trial(kernel, autocast)
    token = torch.zeros((1, 1), dtype=torch.int64, device=forward.device)
    with forward.running():
        forward.call(token, token, trial)
    return trial.reason


class _Trial:
    """An attention context that tries the kernel with the shapes and options of each layer."""

    def __init__(self, kernel: Kernel, autocast: torch.dtype | None):
        self.kernel, self.autocast = kernel, autocast
        self.reason: str | None = None
        self._tried: set[tuple] = set()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **options
    ) -> Tensor:
        """query [1, H, 1, D], key and value [1, Hkv, 1, D] -> [1, 1, H, D] of the right shape, no more."""
        keys, values = (x.to(self.autocast or x.dtype) for x in (key, value))
        asked = (query.shape, keys.shape, keys.dtype, scaling, options.get("sliding_window"))
        if not kernel_takes(query, keys, values, options.get("softcap"), options.get("s_aux")):
            self.reason = "the model asks for a soft cap, sinks, heads of two sizes, or a type that is not of 16 bits"
        elif self.reason is None and asked not in self._tried:
            self._tried.add(asked)
            self.reason = self._compare(query, keys, scaling, options.get("sliding_window"))
        groups = query.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, dim=1).transpose(1, 2)

    def _compare(self, query: Tensor, key: Tensor, scaling: float | None, window: int | None) -> str | None:
        """One token per row, as when decoding, and several, as of the rest of a prompt, over two pages."""
        device, generator = key.device, torch.Generator(key.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=key.dtype)

        keys, values = (normal(4, PAGE, key.shape[1], key.shape[-1]) for _ in range(2))
        tables = torch.tensor([[2, 1], [3, 0]], dtype=torch.int32, device=device)
        lengths = torch.tensor([PAGE + 7, 5], dtype=torch.int32, device=device)
        try:
            for counts in ([1, 1], [4, 2]):
                new = normal(sum(counts), query.shape[1], query.shape[-1])
                found, expected = (
                    Reading(tables, lengths, counts, PAGE + 7, kernel).attend(new, keys, values, scaling, window)
                    for kernel in (self.kernel, None)
                )
                if not (difference := float((found - expected).abs().max())) <= TOLERANCE:
                    return f"the kernel's numbers differ by {difference:.2g}"
        except Exception as error:  # whatever a kernel says of a GPU, a head size or a library that it lacks
            return f"the kernel refuses: {type(error).__name__}: {error}"
        return None
