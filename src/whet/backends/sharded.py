"""Weights in shards: a model taken apart over ranks in place (FSDP2), and single tensors put together again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from whet.backends import experts, tensor_parallel
from whet.backends.device import Arithmetic
from whet.backends.mesh import Meshes
from whet.config.backend import BackendConfig
from whet.models.adapters import decoder_layers
from whet.models.parts import base

T = TypeVar("T")

# What is divided in two ways takes two gathers, which it calls slow and, for sums, inexact; these are no sums.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


class Whole(nn.Module):
    """A model and the heads beside it, to be sharded: whatever runs inside of its call finds the weights there.

    Layers are gathered one by one when they are called; embeddings, heads and all else in between are gathered when
    the call begins, once for everything that reads them, and let go of after the backward pass.
    """

    def __init__(self, model: nn.Module, value_head: nn.Module | None):
        super().__init__()
        self.model, self.value_head = model, value_head

    def forward(self, function: Callable[[], T]) -> T:
        return function()


def shard(whole: Whole, meshes: Meshes, config: BackendConfig, arithmetic: Arithmetic) -> None:
    """Leave on each rank its part of every weight; gradients are summed over ranks, each to its part.

    Layers compute with weights that are sent in the type of autocast, where there is one; all else is float32 as it
    is without ranks.
    """
    pin = arithmetic.device.type == "cuda"
    common = {"offload_policy": CPUOffloadPolicy(pin_memory=pin) if config.offload == "all" else OffloadPolicy()}
    own = {**common, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)}
    cast = MixedPrecisionPolicy(arithmetic.autocast, torch.float32, cast_forward_inputs=False)
    inside = {**common, "mp_policy": cast, "reshard_after_forward": config.reshard_after_forward}
    for layer in decoder_layers(whole.model):
        _solidify(layer)
        if meshes.layout.tensor > 1:
            tensor_parallel.divide(layer, meshes.tensor, meshes.slices)
        if meshes.layout.expert > 1:
            for module in experts.divide(layer, meshes.experts):
                fully_shard(module, mesh=meshes.replicas, **inside)
        fully_shard(layer, mesh=meshes.shards, **inside)
    _solidify(whole)
    for head in (getattr(base(whole.model), "score", None), whole.value_head):
        if head is not None:  # float32 beside weights that need not be
            fully_shard(head, mesh=meshes.shards, reshard_after_forward=False, **own)
    fully_shard(whole, mesh=meshes.shards, reshard_after_forward=False, **own)
    for module in sharded_modules(whole):
        # The weights of a batch sum to one over all ranks: gradients are added up and divided by nothing. gloo knows
        # plain sums only.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _solidify(module: nn.Module) -> None:
    """Give the weights of a hollow model (see `models.hollow`) memory of their own, of which a part is to stay."""
    for weight in module.parameters():
        if not weight.is_contiguous():
            weight.data = weight.data.contiguous()


def sharded_modules(whole: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in whole.modules() if isinstance(module, FSDPModule))


def let_go(whole: nn.Module) -> None:
    """Free gathered weights that a pass without gradient has left; they would be out of date after an update."""
    for module in sharded_modules(whole):
        module.reshard()


@torch.no_grad()
def full(tensor: Tensor, device: torch.device) -> Tensor:
    """The whole of a sharded tensor, on every rank, on the device. All ranks call it in the same order."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to(device)
    shape, stride = tensor.shape, tensor.stride()
    local = tensor.to_local().to(device)  # where it is kept in the CPU's memory
    where = (tensor.device_mesh, tensor.placements)
    return DTensor.from_local(local, *where, run_check=False, shape=shape, stride=stride).full_tensor()


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Set this rank's part of a tensor to that of `values`, which are whole."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(values)
        return
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    part = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    tensor.to_local().copy_(values[part])


def broadcast_from_first(named: Iterable[tuple[str, Tensor]], source: dict[str, Tensor], device: torch.device) -> None:
    """Set tensors, sharded or not, to those that rank 0 has in `source`, one after the other."""
    first = dist.get_rank() == 0
    for name, tensor in named:
        values = source[name].to(device) if first else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        values = values.contiguous()
        dist.broadcast(values, 0)
        fill(tensor, values)


def sum_over_tensor_ranks(parameters: Iterable[nn.Parameter], meshes: Meshes) -> None:
    """Add up the gradients of weights that tensor ranks hold alike: each has those of its own slice."""
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and "tensor" not in (grad.device_mesh.mesh_dim_names or ()):
            local = grad.to_local()
            if local.numel():
                _all_reduce(local, meshes)


def _all_reduce(local: Tensor, meshes: Meshes) -> None:
    device = torch.device(meshes.shards.device_type)
    there = local.to(device)
    dist.all_reduce(there, group=meshes.tensor.get_group())
    if there is not local:
        local.copy_(there)


def norm(grads: Iterable[Tensor], device: torch.device) -> Tensor:
    """The norm of all gradients over all ranks, every part counted once."""
    world, squares = dist.get_world_size(), torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        copies, local = world, grad
        if isinstance(grad, DTensor):
            local = grad.to_local()
            sizes = zip(grad.placements, grad.device_mesh.shape, strict=True)
            for size in (size for placement, size in sizes if not placement.is_replicate()):
                copies //= size
        squares += local.float().square().sum().double().to(device) / copies
    dist.all_reduce(squares)
    return squares.sqrt().float()
