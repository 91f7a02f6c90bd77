"""Tensor parallelism: the matrices of a layer divided over ranks, by what they are in it (Megatron-LM,
arXiv:1909.08053), with the stream of tokens in slices in between (arXiv:2205.05198).

Of attention each rank computes some heads, of the layer behind it some of the inner width. What is not divided works on
slices, so that nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

from whet.backends.exchange import gather_stream, sum_stream
from whet.backends.slices import Slices
from whet.errors import ConfigError
from whet.models.adapters import decoder_layers
from whet.models.parts import base

HEADS_IN, HEADS_OUT = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj"), "o_proj"
WIDTH_IN, WIDTH_OUT = ("gate_proj", "up_proj"), "down_proj"


def check_structure(model: nn.Module) -> None:
    """Raises ConfigError for a model whose layers are made of other parts than are known to be divided."""
    if not all(_attention_of(layer) is not None for layer in decoder_layers(model)):
        raise ConfigError(
            f"backend.tensor_parallel is given, but the attention of {type(base(model)).__name__} is not made of "
            f"{', '.join(HEADS_IN[:3])} and {HEADS_OUT} alone; use backend.context_parallel"
        )


def divide(layer: nn.Module, mesh: DeviceMesh, slices: Slices) -> None:
    """Divide the matrices of a layer over the ranks of the mesh, in place; to be done before they are sharded."""
    attention = _attention_of(layer)
    assert attention is not None, "checked before"
    _divide(attention, HEADS_IN, HEADS_OUT, mesh, slices)
    mlp = getattr(layer, "mlp", None)
    if mlp is not None and all(hasattr(mlp, name) for name in (*WIDTH_IN, WIDTH_OUT)):
        width = _linear(mlp.down_proj).in_features
        if width % mesh.size() == 0:  # else it stays whole, and works on slices
            _divide(mlp, WIDTH_IN, WIDTH_OUT, mesh, slices)


def _attention_of(layer: nn.Module) -> nn.Module | None:
    found = getattr(layer, "self_attn", None)
    if found is None or not hasattr(found, HEADS_OUT) or not _inner(found, HEADS_IN):
        return None
    own = dict(found.named_parameters(recurse=False))  # numbers for each head, such as sinks
    return None if own else found


def _inner(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    return [found for name in names if (found := getattr(module, name, None)) is not None]


def _linear(module: nn.Module) -> nn.Linear:
    """The linear layer itself, below an adapter if it has one."""
    return module.base_layer if hasattr(module, "base_layer") else module


def _divide(block: nn.Module, names_in: tuple[str, ...], name_out: str, mesh: DeviceMesh, slices: Slices) -> None:
    """`block` is a function of tokens that enters by some linear layers and leaves by one."""
    for module in _inner(block, names_in):
        _shard(_linear(module), mesh, 0)
        for _, b in _factors(module):
            _shard(b, mesh, 0)
    out = getattr(block, name_out)
    _shard(_linear(out), mesh, 1)
    for a, _ in _factors(out):
        _shard(a, mesh, 1)
    block.register_forward_pre_hook(_Enter(slices), with_kwargs=True)
    out.register_forward_hook(_Leave(slices, _linear(out)))


def _factors(module: nn.Module) -> Iterator[tuple[nn.Linear, nn.Linear]]:
    """The two matrices of each adapter on a layer."""
    a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    if isinstance(a, nn.ModuleDict) and isinstance(b, nn.ModuleDict):
        yield from ((a[name], b[name]) for name in a)


def _shard(linear: nn.Linear, mesh: DeviceMesh, dim: int) -> None:
    """Let this rank hold its part of the weights along `dim` and compute with that; with dim 1 what comes out is a
    part of a sum, and the bias is left to whoever adds it up."""
    linear.weight = _part(linear.weight, mesh, dim)
    if linear.bias is not None and dim == 0:
        linear.bias = _part(linear.bias, mesh, 0)
    linear.forward = _Local(linear, with_bias=dim == 0)


def _part(parameter: nn.Parameter, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    part = distribute_tensor(parameter.detach(), mesh, [Shard(dim)], src_data_rank=None)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


class _Local:
    """A linear layer with this rank's part of its weights."""

    def __init__(self, linear: nn.Linear, with_bias: bool):
        self.linear, self.with_bias = linear, with_bias

    def __call__(self, x: Tensor) -> Tensor:
        bias = self.linear.bias if self.with_bias else None
        return F.linear(x, local(self.linear.weight), None if bias is None else local(bias))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is divided; gradients flow to it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Enter:
    """Before a divided block: the slices of all its ranks together."""

    def __init__(self, slices: Slices):
        self.slices = slices

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if not self.slices.active:
            return args, kwargs
        group = self.slices.tensor
        if args:
            args = (gather_stream(args[0], group), *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": gather_stream(kwargs["hidden_states"], group)}
        if (rotations := kwargs.get("position_embeddings")) is not None:
            context = kwargs["attention_context"]
            kwargs["position_embeddings"] = tuple(context.widened(x) for x in rotations)
        return args, kwargs


class _Leave:
    """Behind the last layer of a divided block: the parts of the sum added up, for this rank's slice."""

    def __init__(self, slices: Slices, linear: nn.Linear):
        self.slices, self.linear = slices, linear

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self.slices.active:
            output = sum_stream(output, self.slices.tensor)
        else:  # whole rows, alike on all ranks, and without gradient
            output = output.contiguous()
            dist.all_reduce(output, group=self.slices.tensor)
        return output if self.linear.bias is None else output + self.linear.bias
