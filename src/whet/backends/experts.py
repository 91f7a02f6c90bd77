"""Expert parallelism: the experts of a layer divided over ranks, and tokens sent to where theirs are.

Source: GShard, Lepikhin et al. 2020 (arXiv:2006.16668). No token is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from whet.backends.tensor_parallel import local
from whet.errors import ConfigError
from whet.models.adapters import decoder_layers
from whet.models.parts import base


def check_structure(model: nn.Module) -> None:
    """Raises ConfigError for a model whose experts are not stacked, one tensor for all of a layer, or carry an
    adapter."""
    stacks = {module for layer in decoder_layers(model) for module in _stacks(layer)}
    if not stacks:
        raise ConfigError(
            f"backend.expert_parallel is given, but {type(base(model)).__name__} has no layers of experts with stacked "
            "weights; leave it out"
        )
    if any(name.endswith(".base_layer") for name, module in model.named_modules() if module in stacks):
        raise ConfigError(
            "backend.expert_parallel is given, but experts with an adapter are not divided; leave it out, or the "
            "experts out of model.adapter.target_modules ([q_proj, k_proj, v_proj, o_proj])"
        )


def divide(layer: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Leave on each rank of the mesh its part of the layer's experts; returns the modules that hold them."""
    found = _stacks(layer)
    for module in found:
        total = _count(module)
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        module.forward = _Dispatch(module, total, mesh.get_group())
    return found


def _stacks(layer: nn.Module) -> list[nn.Module]:
    """Modules that hold the weights of all experts of a layer, one tensor for all."""
    return [
        module
        for module in layer.modules()
        if hasattr(module, "num_experts") and any(p.dim() == 3 for p in module.parameters(recurse=False))
    ]


def _count(module: nn.Module) -> int:
    return next(len(p) for p in module.parameters(recurse=False) if p.dim() == 3)


class _Here:
    """A module as its own code sees it when it has only the experts of this rank."""

    def __init__(self, module: nn.Module, num_experts: int):
        self._module, self.num_experts = module, num_experts

    def __getattr__(self, name: str) -> Any:
        return local(getattr(self._module, name))


class _Dispatch:
    """Sends each token to the ranks of its experts, once to each, and adds up what comes back."""

    def __init__(self, module: nn.Module, total: int, group: ProcessGroup):
        self.module, self.group = module, group
        self.here = total // group.size()
        self.compute = type(module).forward

    def __call__(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """hidden [n, H], experts and weights [n, k] -> [n, H] (the forward method of the module)."""
        ranks = torch.arange(self.group.size(), device=hidden.device)
        goes = (experts[:, :, None] // self.here == ranks).any(1)  # [n, ranks]
        to, token = goes.t().nonzero(as_tuple=True)  # by rank, as they are sent
        sent = goes.sum(0)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        counts = received.tolist(), sent.tolist()
        offset = to[:, None] * self.here
        mine = (experts[token] >= offset) & (experts[token] < offset + self.here)
        chosen = torch.where(mine, experts[token] - offset, self.here)
        share = torch.where(mine, weights[token], 0)
        there = [_send(x, counts, self.group) for x in (hidden[token], chosen, share)]
        done = self._compute(*there)
        back = _send(done, (counts[1], counts[0]), self.group)
        return torch.zeros_like(hidden).index_add(0, token, back.to(hidden.dtype))

    def _compute(self, hidden: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """What the experts here make of tokens [m, H]; a number behind the last expert stands for one elsewhere."""
        row, slot = (chosen < self.here).nonzero(as_tuple=True)
        if len(row):
            # One expert for each row: not all code of experts can pass over a number.
            one = chosen[row, slot, None], share[row, slot, None]
            made = self.compute(_Here(self.module, self.here), hidden[row], *one)
            return torch.zeros_like(hidden).index_add(0, row, made.to(hidden.dtype))
        # A gradient all the same: ranks with the same experts add theirs up together.
        return hidden + sum(local(p).flatten()[:1].sum() * 0 for p in self.module.parameters(recurse=False))


def _send(x: Tensor, counts: tuple[list[int], list[int]], group: ProcessGroup) -> Tensor:
    """Rows to the ranks in order, of which `counts` are received and sent; gradients go the way back."""
    return _SendRows.apply(x, counts, group) if x.is_floating_point() else _exchange(x, counts, group)


def _exchange(x: Tensor, counts: tuple[list[int], list[int]], group: ProcessGroup) -> Tensor:
    out = x.new_empty(sum(counts[0]), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), counts[0], counts[1], group=group)
    return out


class _SendRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, counts, group):
        ctx.counts, ctx.group = counts, group
        return _exchange(x, counts, group)

    @staticmethod
    def backward(ctx, *grads):
        received, sent = ctx.counts
        return _exchange(grads[0], (sent, received), ctx.group), None, None
