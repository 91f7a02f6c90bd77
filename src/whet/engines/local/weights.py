"""An engine's own copy of a model's weights, which follows the model while another thread trains it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from whet.errors import EngineError


def own_copy(model: nn.Module) -> nn.Module:
    """The same model in memory of its own: adapters included, nothing to train, no dropout."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def num_bytes(model: nn.Module) -> int:
    """Memory that the weights and buffers of a model take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])


class Following:
    """Weights of `model` that take over what is trained in `source`: the parameters that require a gradient there.

    Raises EngineError where the two are not the same model.
    """

    def __init__(self, model: nn.Module, source: nn.Module):
        own = dict(model.named_parameters())
        trained = {name: weight for name, weight in source.named_parameters() if weight.requires_grad}
        for name, weight in trained.items():
            shape = tuple(own[name].shape) if name in own else "missing"
            if shape != tuple(weight.shape):
                raise EngineError(
                    f"the engine's model cannot follow the weights it is given: {name} is {tuple(weight.shape)} where "
                    f"it is trained and {shape} in the engine; give both the same model"
                )
            if own[name] is weight:
                raise EngineError(f"the engine's model shares {name} with the one it is to follow; give it a copy")
        self._pairs: list[tuple[Tensor, Tensor]] = [(own[name], weight) for name, weight in trained.items()]

    @torch.no_grad()
    def update(self) -> None:
        """Copy what is trained, in place. Nobody may be writing to the source meanwhile; reading is fine."""
        for own, trained in self._pairs:
            own.copy_(trained)
