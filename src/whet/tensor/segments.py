"""Attention over a prefix tree: each segment attends to its ancestors and, causally, to itself.

On the CPU the two parts are separate flash calls without any mask, put together by their log-sum-exp:
siblings look at their common ancestors in one call, and short segments of like length go together. On
CUDA all segments are one variable-length call over gathered keys. Where a model asks for more (a sliding
window shorter than the path, soft-capped scores, attention sinks) the scores are formed segment by segment.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whet.tree import Tree

LONG = 256
"""Segments of this length on get a flash call of their own; shorter ones are batched by like length."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Segments:
    """The attention context of one micro-batch: `attend` for every layer, planned once."""

    def __init__(self, tree: Tree, device: torch.device | str = "cpu"):
        self.tree = tree
        self.device = torch.device(device)
        self.max_length = int(tree.position_ids.max()) + 1

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **options
    ) -> Tensor:
        """query [1, H, P, D], key and value [1, Hkv, P, D] -> [1, P, H, D] (see AttentionContext)."""
        if torch.is_autocast_enabled(query.device.type):  # norms and rotations leave them in different types
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        window, width = options.get("sliding_window"), value.shape[-1]
        special = (window and window < self.max_length) or options.get("softcap") or options.get("s_aux") is not None
        if special or width > query.shape[-1]:
            return _attend_by_scores(self._gather, query, key, value, scaling, **options)
        if width < query.shape[-1]:  # flash attention wants heads of one size
            value = F.pad(value, (0, query.shape[-1] - width))
        if query.device.type == "cpu":
            out = _FlashOverTree.apply(query, key, value, self._calls, scaling)
        elif query.dtype in (torch.float16, torch.bfloat16):
            out = _attend_varlen(self._gather, query, key, value, scaling)
        else:
            out = _attend_by_scores(self._gather, query, key, value, scaling)
        return out[..., :width]

    @cached_property
    def _calls(self) -> _Calls:
        return _plan_calls(self.tree)

    @cached_property
    def _gather(self) -> _Gather:
        return _plan_gather(self.tree, self.device)


# --- CPU: flash calls merged by log-sum-exp -----------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """Queries and keys of one flash call: a slice of the stream, or places [rows, length] in it.

    Where rows of queries are padded, by repeating their last place, `padding` [rows, queries] marks it and `real`
    lists the others, as numbers in the flattened places.
    """

    queries: slice | Tensor
    keys: slice | Tensor
    padding: Tensor | None = None
    real: Tensor | None = None


@dataclass(frozen=True)
class _Calls:
    own: list[_Call]
    """Causal, within a segment; together they cover every token once."""
    above: list[_Call]
    """Without mask, from segments to their ancestors."""


def _plan_calls(tree: Tree) -> _Calls:
    ranges = [np.arange(a, b) for a, b in zip(tree.starts[:-1], tree.starts[1:], strict=True)]
    own = [_Call(queries, queries, *padding) for queries, *padding in _batched(ranges)]
    children: dict[int, list[int]] = defaultdict(list)
    for segment, parent in enumerate(tree.parents.tolist()):
        if parent >= 0:
            children[parent].append(segment)
    # Queries may be padded but keys may not, so only equally long paths go together.
    by_path_length: dict[int, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for parent, segments in children.items():
        path = np.concatenate([ranges[s] for s in [*tree.ancestors(parent), parent]])
        by_path_length[len(path)].append((np.concatenate([ranges[s] for s in segments]), path))
    above = []
    for pairs in by_path_length.values():
        pairs.sort(key=lambda pair: len(pair[0]))
        for chunk in _like_lengths([len(queries) for queries, _ in pairs]):
            queries, *padding = _padded([pairs[i][0] for i in chunk])
            keys, *_ = _padded([pairs[i][1] for i in chunk])
            above.append(_Call(queries, keys, *padding))
    return _Calls(own, above)


def _batched(ranges: list[np.ndarray]) -> list[_Padded]:
    order = sorted(range(len(ranges)), key=lambda i: len(ranges[i]))
    return [_padded([ranges[order[i]] for i in chunk]) for chunk in _like_lengths([len(ranges[i]) for i in order])]


def _like_lengths(lengths: list[int]) -> list[list[int]]:
    """Ascending lengths cut into runs that waste at most a quarter when padded to their longest."""
    runs: list[list[int]] = []
    for i, length in enumerate(lengths):
        shortest = lengths[runs[-1][0]] if runs else 0
        if runs and length < LONG and length <= max(shortest * 1.25, shortest + 8):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


_Padded = tuple[slice | Tensor, Tensor | None, Tensor | None]


def _padded(places: list[np.ndarray]) -> _Padded:
    """Places as a slice (one contiguous row) or as [rows, longest], with what `_Call` says of its padding."""
    if len(places) == 1 and places[0][-1] - places[0][0] == len(places[0]) - 1:
        return slice(int(places[0][0]), int(places[0][-1]) + 1), None, None
    lengths = np.array([len(p) for p in places])
    firsts, steps = np.cumsum(lengths) - lengths, np.arange(lengths.max())
    padded = torch.from_numpy(np.concatenate(places)[firsts[:, None] + np.minimum(steps, lengths[:, None] - 1)])
    padding = torch.from_numpy(steps >= lengths[:, None])
    if not padding.any():
        return padded, None, None
    return padded, padding, (~padding).flatten().nonzero()[:, 0]


# Queries, keys and values come token by token in memory, [P, H, D]; whole tokens are moved at a time.


def _take(x: Tensor, places: slice | Tensor) -> Tensor:
    """[P, H, …] -> [rows, H, length, …]."""
    if isinstance(places, slice):
        return x[places].transpose(0, 1).unsqueeze(0)
    return x.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)


def _tokens(values: Tensor) -> Tensor:
    """[rows, H, length, …] -> [rows * length, H, …]."""
    return values.transpose(1, 2).flatten(0, 1)


def _put(x: Tensor, call: _Call, values: Tensor) -> None:
    """Write [rows, H, length, …] to the real queries' places in x [P, H, …]."""
    if isinstance(call.queries, slice):
        x[call.queries] = _tokens(values)
    elif call.real is None:
        x.index_copy_(0, call.queries.flatten(), _tokens(values))
    else:
        x.index_copy_(0, call.queries.flatten()[call.real], _tokens(values)[call.real])


def _add(x: Tensor, places: slice | Tensor, values: Tensor) -> None:
    if isinstance(places, slice):
        x[places] += _tokens(values)
    else:
        x.index_add_(0, places.flatten(), _tokens(values))


class _FlashOverTree(torch.autograd.Function):
    """Exact attention over the tree from mask-free flash calls.

    Attention over a union of key sets is the average of the parts weighted by exp(lse of the part - lse of
    the union). The flash backward of each part is exact too when it is given the union's output and lse.
    """

    @staticmethod
    def forward(ctx, query, key, value, calls: _Calls, scaling):
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        out = query.new_empty(query.shape)
        accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = torch.empty(query.shape[:2], dtype=accumulate)
        for call in calls.own:
            part, part_lse = _flash(*_qkv(query, key, value, call), is_causal=True, scale=scaling)
            _put(out, call, part)
            _put(lse, call, part_lse)
        for call in calls.above:
            part, part_lse = _flash(*_qkv(query, key, value, call), scale=scaling)
            own_lse = _take(lse, call.queries)
            union = torch.logaddexp(own_lse, part_lse)
            own = _take(out, call.queries) * (own_lse - union).exp().unsqueeze(-1)
            _put(out, call, (own + part * (part_lse - union).exp().unsqueeze(-1)).to(out.dtype))
            _put(lse, call, union)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.calls, ctx.scaling = calls, scaling
        return out.unsqueeze(0)

    @staticmethod
    def backward(ctx, *grad_outputs):
        query, key, value, out, lse = ctx.saved_tensors
        grad_out = grad_outputs[0][0]
        grads = [torch.empty_like(x) for x in (query, key, value)]

        def parts(call: _Call, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            call_lse = _take(lse, call.queries)
            if call.padding is not None:  # it repeats a real query; at probability 0 nothing flows back through it
                call_lse = call_lse.masked_fill(call.padding[:, None], torch.inf)
            grad, attended = _take(grad_out, call.queries), _take(out, call.queries)
            qkv = _qkv(query, key, value, call)
            return _flash_backward(grad, *qkv, attended, call_lse, 0.0, causal, scale=ctx.scaling)

        for call in ctx.calls.own:  # which write every token once
            for total, part in zip(grads, parts(call, causal=True), strict=True):
                _put(total, call, part)
        for call in ctx.calls.above:
            places = (call.queries, call.keys, call.keys)
            for total, at, part in zip(grads, places, parts(call, causal=False), strict=True):
                _add(total, at, part)
        return *(grad.transpose(0, 1).unsqueeze(0) for grad in grads), None, None


def _qkv(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    return _take(query, call.queries), _take(key, call.keys), _take(value, call.keys)


# --- CUDA, and models that ask for more ---------------------------------------------------------------


@dataclass(frozen=True)
class _Gather:
    """For every segment its queries (a range of the stream) and its keys (ancestors, then itself)."""

    keys: Tensor
    """[K] places of the keys of all segments, one after another."""
    cu_queries: Tensor
    cu_keys: Tensor
    """[S + 1] int32 bounds of the segments among queries and keys."""
    max_queries: int
    max_keys: int
    positions: Tensor
    """[P] position of each token in its row."""


def _plan_gather(tree: Tree, device: torch.device) -> _Gather:
    ranges = [np.arange(a, b) for a, b in zip(tree.starts[:-1], tree.starts[1:], strict=True)]
    paths = [np.concatenate([ranges[a] for a in [*tree.ancestors(s), s]]) for s in range(len(ranges))]
    cu_keys = np.cumsum([0, *map(len, paths)])
    return _Gather(
        keys=torch.from_numpy(np.concatenate(paths)).to(device),
        cu_queries=torch.from_numpy(tree.starts.astype(np.int32)).to(device),
        cu_keys=torch.from_numpy(cu_keys.astype(np.int32)).to(device),
        max_queries=max(map(len, ranges)),
        max_keys=max(map(len, paths)),
        positions=torch.from_numpy(tree.position_ids).to(device),
    )


def _attend_varlen(gather: _Gather, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """One call for all segments; causal from the bottom right, so that a segment sees its whole path."""
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    k, v = k.index_select(0, gather.keys), v.index_select(0, gather.keys)
    bounds = (gather.cu_queries, gather.cu_keys, gather.max_queries, gather.max_keys)
    attended = cast(Tensor, varlen_attn(q.contiguous(), k, v, *bounds, scale=scaling, **options))
    return attended.unsqueeze(0)


def _attend_by_scores(
    gather: _Gather,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_,
) -> Tensor:
    """Segment by segment with explicit scores: slower, but it can do what any model asks."""
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    queries, keys = gather.cu_queries.tolist(), gather.cu_keys.tolist()
    for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True):
        places = gather.keys[c:d]
        k, v = (x[:, :, places].repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query[:, :, a:b] @ k.transpose(-1, -2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = gather.positions[a:b, None] - gather.positions[places]
        hidden = (distance < 0) | (distance >= sliding_window) if sliding_window else distance < 0
        scores = scores.masked_fill(hidden, float("-inf")).float()
        if s_aux is not None:  # a learned score per head that takes up probability and gives nothing
            sink = s_aux.float().reshape(1, -1, 1, 1).expand(1, -1, b - a, 1)
            probabilities = F.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
        else:
            probabilities = F.softmax(scores, -1)
        outputs.append((probabilities.to(v.dtype) @ v).transpose(1, 2))
    return torch.cat(outputs, dim=1)
