"""An engine's own copy of a model's weights, which follows the model while another thread trains it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from whet.errors import EngineError


def own_copy(model: nn.Module) -> nn.Module:
    """The same model in memory of its own: adapters included, nothing to train, no dropout."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def num_bytes(model: nn.Module) -> int:
    """Memory that the weights and buffers of a model take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])


Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""A pass over (name in the model, full tensor) of what is trained, each valid until the next is asked for."""


def trained_in(model: nn.Module) -> Weights:
    """The parameters of a model in this process that require a gradient."""

    def weights() -> Iterator[tuple[str, Tensor]]:
        yield from ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)

    return weights


class Following:
    """Weights of `model` that take over what is trained elsewhere, in a model of this process or of many."""

    def __init__(self, model: nn.Module, source: nn.Module | Weights):
        self._own = dict(model.named_parameters())
        self._source = trained_in(source) if isinstance(source, nn.Module) else source

    @torch.no_grad()
    def update(self) -> None:
        """Copy what is trained, in place. Nobody may be writing to the source meanwhile; reading is fine.

        Raises EngineError where the two are not the same model.
        """
        for name, weight in self._source():
            own = self._own.get(name)
            if own is None or own.shape != weight.shape:
                shape = "missing" if own is None else tuple(own.shape)
                raise EngineError(
                    f"the engine's model cannot follow the weights it is given: {name} is {tuple(weight.shape)} where "
                    f"it is trained and {shape} in the engine; give both the same model"
                )
            if own is weight:
                raise EngineError(f"the engine's model shares {name} with the one it is to follow; give it a copy")
            own.copy_(weight)
