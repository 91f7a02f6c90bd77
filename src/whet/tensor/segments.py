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

    `valid` [rows, queries] marks the real queries among padding; None when all are real.
    """

    queries: slice | Tensor
    keys: slice | Tensor
    valid: Tensor | None = None


@dataclass(frozen=True)
class _Calls:
    own: list[_Call]
    """Causal, within a segment; together they cover every token once."""
    above: list[_Call]
    """Without mask, from segments to their ancestors."""


def _plan_calls(tree: Tree) -> _Calls:
    ranges = [np.arange(a, b) for a, b in zip(tree.starts[:-1], tree.starts[1:], strict=True)]
    own = [_Call(q, q, valid) for q, valid in _batched(ranges)]
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
            queries, valid = _padded([pairs[i][0] for i in chunk])
            keys, _ = _padded([pairs[i][1] for i in chunk])
            above.append(_Call(queries, keys, valid))
    return _Calls(own, above)


def _batched(ranges: list[np.ndarray]) -> list[tuple[slice | Tensor, Tensor | None]]:
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


def _padded(places: list[np.ndarray]) -> tuple[slice | Tensor, Tensor | None]:
    """Places as a slice (one contiguous row) or as [rows, longest], padded with each row's last place."""
    if len(places) == 1 and places[0][-1] - places[0][0] == len(places[0]) - 1:
        return slice(int(places[0][0]), int(places[0][-1]) + 1), None
    longest = max(map(len, places))
    padded = np.stack([np.pad(p, (0, longest - len(p)), mode="edge") for p in places])
    valid = np.arange(longest) < np.array([len(p) for p in places])[:, None]
    return torch.from_numpy(padded), None if valid.all() else torch.from_numpy(valid)


def _take(x: Tensor, places: slice | Tensor) -> Tensor:
    """[1, H, P, …] -> [rows, H, length, …]."""
    if isinstance(places, slice):
        return x[:, :, places]
    return x[0].index_select(1, places.flatten()).unflatten(1, places.shape).transpose(0, 1)


def _rows(values: Tensor) -> Tensor:
    """[rows, H, length, …] -> [H, rows * length, …]."""
    return values.transpose(0, 1).flatten(1, 2)


def _put(x: Tensor, call: _Call, values: Tensor) -> None:
    """Write [rows, H, length, …] to the real queries' places in x [1, H, P, …]."""
    if isinstance(call.queries, slice):
        x[:, :, call.queries] = values
    elif call.valid is None:
        x[0].index_copy_(1, call.queries.flatten(), _rows(values))
    else:
        real = call.valid.flatten()
        x[0].index_copy_(1, call.queries.flatten()[real], _rows(values)[:, real])


def _add(x: Tensor, places: slice | Tensor, values: Tensor) -> None:
    if isinstance(places, slice):
        x[:, :, places] += values
    else:
        x[0].index_add_(1, places.flatten(), _rows(values))


class _FlashOverTree(torch.autograd.Function):
    """Exact attention over the tree from mask-free flash calls.

    Attention over a union of key sets is the average of the parts weighted by exp(lse of the part - lse of
    the union). The flash backward of each part is exact too when it is given the union's output and lse.
    """

    @staticmethod
    def forward(ctx, query, key, value, calls: _Calls, scaling):
        _, heads, length, dim = query.shape
        out = query.new_empty(1, length, heads, dim).transpose(1, 2)
        accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = torch.empty(1, heads, length, dtype=accumulate)
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
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, *grad_outputs):
        query, key, value, out, lse = ctx.saved_tensors
        grad_out = grad_outputs[0].transpose(1, 2)
        grads = [torch.zeros_like(x) for x in (query, key, value)]
        for calls, causal in ((ctx.calls.own, True), (ctx.calls.above, False)):
            for call in calls:
                grad = _take(grad_out, call.queries)
                if call.valid is not None:  # padding repeats a real query; nothing may flow back through it
                    grad = grad * call.valid[:, None, :, None]
                qkv = _qkv(query, key, value, call)
                rest = (_take(out, call.queries), _take(lse, call.queries), 0.0, causal)
                parts = _flash_backward(grad, *qkv, *rest, scale=ctx.scaling)
                for total, places, part in zip(grads, (call.queries, call.keys, call.keys), parts, strict=True):
                    _add(total, places, part)
        return *grads, None, None


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
