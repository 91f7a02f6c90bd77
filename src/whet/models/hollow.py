"""A causal language model that takes no memory: every weight has its shape and type, and none has numbers of its own.

Ranks of a run that are given their part of the weights by another begin with one. Unlike a model on PyTorch's meta
device its buffers are real, and adapters are drawn for it as for any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def hollow_model(config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration, on the CPU; its weights must not be written to. Takes no random numbers."""
    with torch.random.fork_rng(devices=[]), _weightless():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                if id(weight) not in made:
                    zero = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                    made[id(weight)] = nn.Parameter(zero, requires_grad=weight.requires_grad)
                module._parameters[name] = made[id(weight)]
    model.name_or_path = config.name_or_path
    return model.eval()


@contextmanager
def _weightless() -> Iterator[None]:
    """Weights that modules are given lose their numbers at once."""
    before = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":  # tied weights stay so
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        before(module, name, parameter)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = before
