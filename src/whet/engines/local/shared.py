"""Attention of one new token per row where rows share their prompt: it is read once, for the queries of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LEAST_TOKENS = 64
"""A shorter prompt is read as fast by every row for itself."""

Rows = slice | Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Sharers:
    """Rows of which each holds the same keys and values at its first `length` positions."""

    rows: np.ndarray
    length: int


class SharedPrompts:
    """The rows of a decoding step by the prompt that they share; those that share none stand for themselves.

    Groups of as many rows with prompts as long go into one call. The attention of a row over its prompt and that over
    the rest are averaged by their sums of exponentials, which is exact (as in `tensor.segments`).
    """

    def __init__(self, sharers: Sequence[Sharers], lengths: np.ndarray) -> None:
        bunches: dict[tuple[int, int], list[np.ndarray]] = {}
        alone = np.ones(len(lengths), dtype=bool)
        for one in sharers:
            if len(one.rows) > 1 and one.length >= LEAST_TOKENS:
                bunches.setdefault((one.length, len(one.rows)), []).append(one.rows)
                alone[one.rows] = False
        self.bunches = [_Bunch(length, np.stack(rows), lengths) for (length, _), rows in bunches.items()]
        singles = np.flatnonzero(alone)
        runs = np.split(singles, np.flatnonzero(np.diff(singles) != 1) + 1)
        self.alone = [(slice(int(run[0]), int(run[-1]) + 1), int(lengths[run].max())) for run in runs if len(run)]

    def __bool__(self) -> bool:
        return bool(self.bunches)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
        """query [B, Hkv, G, D], keys and values [rows, Hkv, length, D], mask [B, 1, 1, length] -> [B, Hkv, G, D]."""
        out = torch.empty_like(query)
        for rows, end in self.alone:
            out[rows], _ = _own(query, keys, values, mask, scaling, rows, slice(0, end))
        for bunch in self.bunches:
            out[bunch.rows] = bunch.attend(query, keys, values, mask, scaling)
        return out


class _Bunch:
    """Groups of as many rows each, whose prompts are as long."""

    def __init__(self, length: int, rows: np.ndarray, lengths: np.ndarray) -> None:
        flat = rows.ravel()
        neighbours = bool((np.diff(flat) == 1).all())  # which need no copy
        self.rows: Rows = slice(int(flat[0]), int(flat[-1]) + 1) if neighbours else torch.from_numpy(flat)
        self.shape, self.length = rows.shape, length
        self.first = torch.from_numpy(rows[:, 0].copy())
        self.rest = slice(length, int(lengths[flat].max()))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
        """Of the rows in the order of `rows`: [rows, Hkv, G, D]."""
        asked = query[self.rows].unflatten(0, self.shape).transpose(1, 2)  # a group's queries are those of one row
        held = keys[self.first, :, : self.length], values[self.first, :, : self.length]
        prompt, prompt_lse = _flash(asked.flatten(2, 3), *held, scale=scaling)
        prompt = prompt.unflatten(2, asked.shape[2:4]).transpose(1, 2).flatten(0, 1)
        prompt_lse = prompt_lse.unflatten(2, asked.shape[2:4]).transpose(1, 2).flatten(0, 1)
        own, own_lse = _own(query, keys, values, mask, scaling, self.rows, self.rest)
        share = torch.sigmoid(own_lse - prompt_lse).unsqueeze(-1).to(own.dtype)
        return torch.lerp(prompt, own, share)


def _own(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None, rows: Rows, span: slice
) -> tuple[Tensor, Tensor]:
    """Attention of rows over this span of what each holds, and its log sum of exponentials."""
    asked = query[rows]
    hidden = mask[rows][..., span].expand(-1, -1, asked.shape[2], -1)
    out, lse = _flash(asked, keys[rows, :, span], values[rows, :, span], attn_mask=hidden, scale=scaling)
    return out, lse
