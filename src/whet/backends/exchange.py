"""Collectives that gradients flow through: what ranks that share one stream of tokens exchange with one another.

Each rank holds a slice of the stream; the loss is computed on every rank from the same gathered values, so that
gradients of parameters are partial on each rank and their sum over the ranks is the gradient.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Newer versions of PyTorch warn of the older names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_stream(x: Tensor, group: ProcessGroup) -> Tensor:
    """Slices [1, n, ...] -> the stream of all ranks [1, ranks * n, ...]; gradients are summed and cut again."""
    return x if group.size() == 1 else _GatherStream.apply(x, group)


def sum_stream(x: Tensor, group: ProcessGroup) -> Tensor:
    """Parts [1, n, ...] of a sum over ranks -> this rank's slice [1, n / ranks, ...] of the sum."""
    return x if group.size() == 1 else _SumStream.apply(x, group)


def heads_for_stream(x: Tensor, group: ProcessGroup) -> Tensor:
    """All heads on a slice [1, H, n, D] -> a part of the heads on the whole stream [1, H / ranks, ranks * n, D]."""
    return x if group.size() == 1 else _HeadsForStream.apply(x, group)


def stream_for_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """A part of the heads on the whole stream [1, P, h, D] -> all heads on a slice [1, P / ranks, ranks * h, D]."""
    return x if group.size() == 1 else _StreamForHeads.apply(x, group)


def sum_alike(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over ranks that go on alike with it: its gradient, the same on each, goes back to each as it is."""
    return x if group.size() == 1 else _SumAlike.apply(x, group)


def _gather(x: Tensor, group: ProcessGroup) -> Tensor:
    own = x[0].contiguous()
    out = own.new_empty(group.size() * len(own), *own.shape[1:])
    _all_gather(out, own, group=group)
    return out[None]


def _sum_slices(x: Tensor, group: ProcessGroup) -> Tensor:
    whole = x[0].contiguous()
    out = whole.new_empty(len(whole) // group.size(), *whole.shape[1:])
    _reduce_scatter(out, whole, group=group)
    return out[None]


def _to_stream(x: Tensor, group: ProcessGroup) -> Tensor:
    """[1, n, H, D] -> [1, ranks * n, H / ranks, D]"""
    by_rank = x[0].unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    out = torch.empty_like(by_rank)
    dist.all_to_all_single(out, by_rank, group=group)
    return out.flatten(0, 1)[None]


def _to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """[1, P, h, D] -> [1, P / ranks, ranks * h, D]"""
    by_rank = x[0].unflatten(0, (group.size(), -1)).contiguous()
    out = torch.empty_like(by_rank)
    dist.all_to_all_single(out, by_rank, group=group)
    return out.transpose(0, 1).flatten(1, 2)[None]


class _GatherStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx, *grads):
        return _sum_slices(grads[0], ctx.group), None


class _SumStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _sum_slices(x, group)

    @staticmethod
    def backward(ctx, *grads):
        return _gather(grads[0], ctx.group), None


class _HeadsForStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _to_stream(x.transpose(1, 2), group).transpose(1, 2)

    @staticmethod
    def backward(ctx, *grads):
        return _to_heads(grads[0].transpose(1, 2), ctx.group).transpose(1, 2), None


class _StreamForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _to_heads(x, group)

    @staticmethod
    def backward(ctx, *grads):
        return _to_stream(grads[0], ctx.group), None


class _SumAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None
