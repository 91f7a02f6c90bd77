"""Collectives that gradients flow through, between ranks that share the tokens of one stream."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def tokens_to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """All heads of a part of the tokens [n, H, D] -> a part of the heads of all tokens [ranks * n, H / ranks, D]."""
    return x if group.size() == 1 else _TokensToHeads.apply(x, group)


def heads_to_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """The way back: [P, h, D] -> [P / ranks, ranks * h, D]."""
    return x if group.size() == 1 else _HeadsToTokens.apply(x, group)


def sum_alike(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over ranks that all go on with it in the same way: each gets its gradient as it is."""
    return x if group.size() == 1 else _SumAlike.apply(x, group)


def _to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    by_rank = x.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    out = torch.empty_like(by_rank)
    dist.all_to_all_single(out, by_rank, group=group)
    return out.flatten(0, 1)


def _to_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    by_rank = x.unflatten(0, (group.size(), -1)).contiguous()
    out = torch.empty_like(by_rank)
    dist.all_to_all_single(out, by_rank, group=group)
    return out.transpose(0, 1).flatten(1, 2)


class _TokensToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _to_heads(x, group)

    @staticmethod
    def backward(ctx, *grads):
        return _to_tokens(grads[0], ctx.group), None


class _HeadsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _to_tokens(x, group)

    @staticmethod
    def backward(ctx, *grads):
        return _to_heads(grads[0], ctx.group), None


class _SumAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None
