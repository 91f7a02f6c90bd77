"""How the tokens of one forward call attend where keys and values lie in pages: by a kernel that reads them there, or
over a copy in one piece."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from whet.engines.local.contexts import Prefill, attend_masked, hiding
from whet.engines.local.pages import Kernel, PagedCache

HALF = (torch.float16, torch.bfloat16)
"""Types that flash attention's kernel computes in."""


@cache
def paged_kernel() -> Kernel | None:
    """Attention that takes a table of pages, if this PyTorch has one."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"block_table", "seqused_k", "enable_gqa", "window_size"}
    return varlen_attn if needed <= set(inspect.signature(varlen_attn).parameters) else None


def kernel_takes(query: Tensor, keys: Tensor, values: Tensor, softcap: float | None, s_aux: Tensor | None) -> bool:
    """Whether the kernel can do what a layer asks, by the shapes [..., D] of its heads and the type of its keys."""
    plain = not softcap and s_aux is None and keys.dtype in HALF
    return plain and query.shape[-1] == keys.shape[-1] == values.shape[-1]


class Reading:
    """Rows whose new tokens come one after another in a stream, and the pages that each looks at.

    Row i has `counts[i]` of the tokens, the last of which stands at position `lengths[i] - 1`; `tables`
    [rows, pages] int32 are its pages. `lengths` may be filled anew between two runs, if they stay within `longest`.
    """

    def __init__(self, tables: Tensor, lengths: Tensor, counts: Sequence[int], longest: int, kernel: Kernel | None):
        self.tables, self.lengths, self.longest, self.kernel = tables, lengths, longest, kernel
        self.bounds = [0, *np.cumsum(counts).tolist()]
        self.most = max(counts)
        if self.most == 1:  # nothing is copied to the device: this may be captured in a graph
            self._cu = torch.arange(len(self.bounds), dtype=torch.int32, device=tables.device)
        else:
            self._cu = torch.tensor(self.bounds, dtype=torch.int32, device=tables.device)
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float | None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_,
    ) -> Tensor:
        """query [P, H, D], pools [pages, page, Hkv, D] -> [P, H, D]."""
        query = query.to(keys.dtype)
        if self.kernel is not None and kernel_takes(query, keys, values, softcap, s_aux):
            # Causal from the bottom right: the last query looks at everything.
            window = (sliding_window - 1, 0) if sliding_window else (-1, 0)
            bounds = self._cu, None, self.most, self.longest
            options = {"scale": scaling, "window_size": window, "enable_gqa": True}
            paged = {"seqused_k": self.lengths, "block_table": self.tables}
            return self.kernel(query.contiguous(), keys, values, *bounds, **options, **paged)
        options = {"softcap": softcap, "s_aux": s_aux}
        if self.most == 1:  # all rows in one call
            mask = self._mask(0, sliding_window, keys.dtype)
            return _over_copy(query[:, None], keys, values, self.tables, mask, scaling, **options)[:, 0]
        outs = []
        for row, (a, b) in enumerate(pairwise(self.bounds)):
            tables, mask = self.tables[row : row + 1], self._mask(row, sliding_window, keys.dtype)
            outs.append(_over_copy(query[None, a:b], keys, values, tables, mask, scaling, **options)[0])
        return torch.cat(outs)

    def _mask(self, row: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[queries, longest], 0 where a query looks and -inf elsewhere; the same for all layers with this window.

        Of all rows, one query each, or of the queries of one row.
        """
        if (row, window) not in self._masks:
            positions = self.lengths - 1
            if self.most > 1:
                count = self.bounds[row + 1] - self.bounds[row]
                positions = positions[row] + torch.arange(1 - count, 1, device=positions.device)
            self._masks[row, window] = hiding(positions, self.longest, window, dtype)
        return self._masks[row, window]


def _over_copy(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, mask: Tensor, scaling: float | None, **options
) -> Tensor:
    """query [B, Q, H, D], pools, tables [B, pages] -> [B, Q, H, D].

    `mask`, [B, length] for one query each or [Q, length] for one row, says over how many positions.
    """
    (batch, count, heads, _), kv_heads, length = query.shape, keys.shape[2], mask.shape[-1]
    k, v = (pool[tables].flatten(1, 2)[:, :length].transpose(1, 2) for pool in (keys, values))
    # Heads that share a key become queries of one head: no key is repeated in memory.
    grouped = query.transpose(1, 2).reshape(batch, kv_heads, heads // kv_heads * count, -1)
    mask = mask[:, None, None] if count == 1 else mask.repeat(heads // kv_heads, 1)
    out = attend_masked(grouped, k, v, mask, scaling, **options)
    return out.reshape(batch, heads, count, -1).transpose(1, 2)


class PagedPrefill(Prefill):
    """Prompts in packed form, shared prefixes once; their keys and values go to pages.

    Token `places[i]` of the packed stream is written at `positions[i]` of page `slots[i]`.
    """

    def _write(self, held: Tensor, new: Tensor) -> None:
        held[self.slots, self.positions] = new


class PagedExtend:
    """The rest of prompts whose beginnings lie in slots already, in packed form (see `Extend`)."""

    def __init__(
        self,
        cache: PagedCache,
        slots: Sequence[int],
        starts: Sequence[int],
        lengths: Sequence[int],
        device: torch.device,
    ):
        self.cache = cache
        ends = np.add(starts, lengths)
        positions = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        places = cache.places(np.repeat(slots, lengths), positions)
        self.pages, self.offsets = (torch.from_numpy(x).to(device) for x in places)
        longest = int(ends.max())
        tables = torch.from_numpy(cache.tables(slots, longest)).to(device)
        reached = torch.from_numpy(ends.astype(np.int32)).to(device)
        self.reading = Reading(tables, reached, lengths, longest, cache.kernel)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **options
    ) -> Tensor:
        """query [1, H, P, D], key and value [1, Hkv, P, D] -> [1, P, H, D] (see AttentionContext)."""
        keys, values = self.cache.layer(module.layer_idx, key, value)
        keys[self.pages, self.offsets] = key[0].transpose(0, 1).to(keys.dtype)
        values[self.pages, self.offsets] = value[0].transpose(0, 1).to(values.dtype)
        return self.reading.attend(query[0].transpose(0, 1), keys, values, scaling, **options)[None]


class PagedDecode:
    """One new token for each of some rows, attending to what their pages hold up to its own position.

    `tables` [B, pages] int32 and `positions` [B] say where; they may be filled anew between two runs, for positions
    below `longest`.
    """

    def __init__(
        self,
        cache: PagedCache,
        tables: Tensor,
        positions: Tensor,
        longest: int,
    ):
        self.cache = cache
        column, self.offsets = positions // cache.page, positions % cache.page
        self.pages = tables.gather(1, column[:, None])[:, 0]
        lengths = (positions + 1).to(torch.int32)
        self.reading = Reading(tables, lengths, [1] * len(positions), longest, cache.kernel)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **options
    ) -> Tensor:
        """query [B, H, 1, D], key and value [B, Hkv, 1, D] -> [B, 1, H, D] (see AttentionContext)."""
        keys, values = self.cache.layer(module.layer_idx, key, value)
        keys[self.pages, self.offsets] = key[:, :, 0].to(keys.dtype)
        values[self.pages, self.offsets] = value[:, :, 0].to(values.dtype)
        return self.reading.attend(query[:, :, 0], keys, values, scaling, **options)[:, None]
