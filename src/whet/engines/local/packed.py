"""Linear layers with their weights in the order in which the CPU's matrix kernels read them: for the few rows of a
decoding step up to three times as fast as with the weights as they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whet.models.parts import Head

SMALLEST = 2**16
"""Layers with fewer weights gain nothing: calling the kernel takes as long as it does."""
ROWS = 64
"""Rows that the order is chosen for; it serves any number."""
TYPES = (torch.float32, torch.bfloat16)


class Packed:
    """Packed copies of the linear layers of a model on the CPU, each made anew when its weight has changed.

    `autocast` is the type that the layers compute in, None for that of their weights. On other devices, and for other
    types, the layers stay as they are; so they do without a `model`.
    """

    def __init__(self, model: nn.Module | None, head: Head, autocast: torch.dtype | None):
        self.autocast, self._head = autocast, head
        self._weights: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        for module in [] if model is None else model.modules():
            linear = type(module) is nn.Linear and "forward" not in module.__dict__
            if (linear or module is head.module) and self._gains(module.weight):
                self._weights[module] = module.weight, module.bias
        self.clear()

    def clear(self) -> None:
        """Let go of the copies; the next use makes them again."""
        self._calls: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        self._states: dict[nn.Module, tuple[int, int]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within this context the layers compute with their packed weights."""
        self._refresh()
        modules = [module for module in self._calls if module is not self._head.module]
        for module in modules:
            module.__dict__["forward"] = self._calls[module]
        try:
            yield
        finally:
            for module in modules:
                del module.__dict__["forward"]

    def head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear layer of the head, in place of `F.linear`."""
        call = self._calls.get(self._head.module)
        return F.linear(hidden, weight, bias) if call is None else call(hidden)

    def _refresh(self) -> None:
        for module, (weight, bias) in self._weights.items():
            state = weight.data_ptr(), weight._version
            if self._states.get(module) != state:
                dtype = self.autocast or weight.dtype
                packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), ROWS)
                bias = bias if bias is None else bias.detach().to(dtype)
                self._calls[module], self._states[module] = partial(_linear, packed, bias, dtype), state

    def _gains(self, weight: Tensor) -> bool:
        return (
            weight.device.type == "cpu"
            and weight.numel() >= SMALLEST
            and weight.dtype in TYPES
            and self.autocast in (None, *TYPES)
            and not weight.is_inference()  # does not tell when it changes
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        )


def _linear(packed: Tensor, bias: Tensor | None, dtype: torch.dtype, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")
