"""How the tokens of one forward call attend in the embedded engine: prompts among themselves, new tokens to a cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whet.engines.local.cache import SlotCache
from whet.engines.local.pages import PagedCache
from whet.engines.local.shared import SharedPrompts, Sharers
from whet.errors import EngineError
from whet.tensor.segments import Segments

CALL_ELEMENTS = 2**18
"""Numbers of keys that make one attention call on the CPU worth its overhead (then below a tenth of it)."""
UNSUPPORTED = ("position_bias", "indices", "block_indices", "sinks")
"""What some models hand to their attention beside a window, a soft cap or sinks (`s_aux`), and we cannot do."""


def refuse_unsupported(options: dict) -> None:
    """Raise EngineError if a model's attention is given something that would be silently left out."""
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise EngineError(
                f"the model's attention is given {name!r}, which the embedded engine does not know; "
                "choose an engine that serves this model with engine.use"
            )


class Prefill:
    """Prompts in packed form, shared prefixes once; their keys and values go to the slots of all who asked.

    Token `places[i]` of the packed stream is written to position `positions[i]` of slot `slots[i]`.
    """

    def __init__(
        self, cache: SlotCache | PagedCache, segments: Segments, slots: Tensor, positions: Tensor, places: Tensor
    ):
        self.cache, self.segments = cache, segments
        self.slots, self.positions, self.places = slots, positions, places

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **options
    ) -> Tensor:
        """query [1, H, P, D], key and value [1, Hkv, P, D] -> [1, P, H, D] (see AttentionContext)."""
        keys, values = self.cache.layer(module.layer_idx, key, value)
        query, key, value = query.to(keys.dtype), key.to(keys.dtype), value.to(values.dtype)
        self._write(keys, key[0].transpose(0, 1)[self.places])
        self._write(values, value[0].transpose(0, 1)[self.places])
        return self.segments.attend(module, query, key, value, scaling, **options)

    def _write(self, held: Tensor, new: Tensor) -> None:
        held[self.slots, :, self.positions] = new


class Extend:
    """The rest of prompts whose beginnings lie in slots already, in packed form.

    Prompt i, from its token `starts[i]` on, is `lengths[i]` tokens of the stream; they go to slot `slots[i]` and
    attend to all that stands there before them.
    """

    def __init__(self, cache: SlotCache, slots: Sequence[int], starts: Sequence[int], lengths: Sequence[int]):
        self.cache = cache
        self.rows = list(zip(slots, starts, lengths, accumulate(lengths, initial=0), strict=False))
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **options
    ) -> Tensor:
        """query [1, H, P, D], key and value [1, Hkv, P, D] -> [1, P, H, D] (see AttentionContext)."""
        keys, values = self.cache.layer(module.layer_idx, key, value)
        outs = []
        for row, (slot, start, length, at) in enumerate(self.rows):
            end, places = start + length, slice(at, at + length)
            keys[slot, :, start:end] = key[0, :, places]
            values[slot, :, start:end] = value[0, :, places]
            q = query[:, :, places].to(keys.dtype).reshape(1, keys.shape[1], -1, query.shape[-1])
            mask = self._mask(row, options.get("sliding_window"), keys)
            groups = query.shape[1] // keys.shape[1]
            k, v = keys[slot : slot + 1, :, :end], values[slot : slot + 1, :, :end]
            out = attend_masked(q, k, v, mask.repeat(groups, 1), scaling, **options)
            outs.append(out.reshape(query.shape[1], length, -1).transpose(0, 1))
        return torch.cat(outs)[None]

    def _mask(self, row: int, window: int | None, keys: Tensor) -> Tensor:
        """[length, start + length], 0 where a token looks and -inf elsewhere; the same for all layers."""
        if (row, window) not in self._masks:
            _, start, length, _ = self.rows[row]
            positions = torch.arange(start, start + length, device=keys.device)
            self._masks[row, window] = hiding(positions, start + length, window, keys.dtype)
        return self._masks[row, window]


class Decode:
    """One new token for each of the first B slots, attending to what its slot holds up to its own position.

    `positions` [B] are those of the new tokens. The slots must be reserved up to them. `sharers` are rows with the same
    prompt, which is read once for all of them (on the CPU alone).
    """

    shared: SharedPrompts | None = None
    """None where every row reads its own prompt."""

    def __init__(self, cache: SlotCache, positions: np.ndarray, device: torch.device, sharers: Sequence[Sharers] = ()):
        self.cache = cache
        if sharers:
            self.shared = SharedPrompts(sharers, positions + 1)
        self.lengths = positions + 1
        self.length = int(self.lengths.max())
        self.positions = torch.from_numpy(positions).to(device)
        self.slots = torch.arange(len(positions), device=device)
        self._masks: dict[int | None, Tensor] = {}
        self._blocks: list[tuple[int, int, int]] = []

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        sliding_window: int | None = None,
        **options,
    ) -> Tensor:
        """query [B, H, 1, D], key and value [B, Hkv, 1, D] -> [B, 1, H, D] (see AttentionContext)."""
        keys, values = self.cache.layer(module.layer_idx, key, value)
        keys[self.slots, :, self.positions] = key[:, :, 0].to(keys.dtype)
        values[self.slots, :, self.positions] = value[:, :, 0].to(values.dtype)
        batch, heads = query.shape[:2]
        # Heads that share a key become queries of one head: no key is repeated in memory.
        query = query.to(keys.dtype).reshape(batch, keys.shape[1], -1, query.shape[-1])
        mask = self._mask(sliding_window, keys.dtype)
        plain = sliding_window is None and options.get("softcap") is None and options.get("s_aux") is None
        if self.shared and plain and keys.shape[-1] == values.shape[-1]:
            out = self.shared.attend(query, keys, values, mask, scaling)
            return out.reshape(batch, 1, heads, -1)
        outs = []
        for a, b, length in self._blocks_for(keys):
            k, v, m = keys[a:b, :, :length], values[a:b, :, :length], mask[a:b, ..., :length]
            outs.append(attend_masked(query[a:b], k, v, m, scaling, **options))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.reshape(batch, 1, heads, -1)

    def _blocks_for(self, keys: Tensor) -> list[tuple[int, int, int]]:
        """Neighbouring rows that attend in one call, and the longest of them: (first row, row behind, length).

        A call reads every row of it up to the longest. On the CPU several calls waste less than one, as long
        as each has enough to do; elsewhere launching them costs more than it saves.
        """
        if not self._blocks:
            num_rows = len(self.lengths)
            size = num_rows
            if keys.device.type == "cpu":
                size = max(1, CALL_ELEMENTS // (self.length * keys.shape[1] * keys.shape[3]))
            starts = np.arange(0, num_rows, size)
            ends, lengths = np.append(starts[1:], num_rows), np.maximum.reduceat(self.lengths, starts)
            self._blocks = list(zip(starts.tolist(), ends.tolist(), lengths.tolist(), strict=True))
        return self._blocks

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, 1, length], 0 where a row looks and -inf elsewhere; the same for all layers with this window."""
        if window not in self._masks:
            self._masks[window] = hiding(self.positions, self.length, window, dtype)[:, None, None]
        return self._masks[window]


def hiding(positions: Tensor, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[len(positions), length]: 0 where a token at each position looks, -inf elsewhere."""
    distance = positions[:, None] - torch.arange(length, device=positions.device)
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def attend_masked(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_,
) -> Tensor:
    """query [B, Hkv, Q, D], keys and values [B, Hkv, S, D] -> [B, Hkv, Q, D].

    The queries are those of all heads that share a key, head by head. `mask` is added to the scores.
    """
    if not softcap and s_aux is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float() + mask
    if s_aux is None:
        weights = scores.softmax(-1)
    else:  # a learned score per head that takes up probability and gives nothing
        per_head = scores.shape[1] * scores.shape[2] // len(s_aux)
        sink = (
            s_aux.float().repeat_interleave(per_head).reshape(1, *scores.shape[1:3], 1).expand(len(scores), -1, -1, 1)
        )
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values
