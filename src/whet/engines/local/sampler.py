"""Sampling of one token per row, all rows at once, each with its own temperature, top-p, top-k and random number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Vocabulary entries summed up together: the random number first finds a block, then an entry in it."""
NUCLEUS = 256
"""Entries sorted to find a nucleus (top-p) before the whole vocabulary is."""
ALMOST_ONE = 1 - 2.0**-32


@dataclass(frozen=True)
class Draws:
    """How each of B rows draws its token: arrays [B]. `uniform` lies in [0, 1); temperature 0 is greedy."""

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    uniform: np.ndarray


def mix(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64 in which every input bit moves every output bit (Steele et al. 2014, SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_key(seed: int) -> np.uint64:
    """What a seed's random numbers start from. Mixed, so that neighbouring seeds have nothing in common."""
    return mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))[0]


def uniforms(keys: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) per row, a function of the row's stream key and token index alone.

    SplitMix64 (Steele et al. 2014) is counter-based: its nth number needs none before it.
    """
    counters = (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (mix(keys + counters) >> np.uint64(11)) * 2.0**-53


def sample(logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """logits [B, V] float32, overwritten -> tokens [B] int64 and their logprobs [B] float64.

    Logprobs are those of softmax(logits / temperature) over the whole vocabulary, whatever top-k and top-p cut
    (temperature 0: the likeliest token, at temperature 1). top-k applies first, then top-p to what it leaves.
    """
    device = logits.device
    greedy = np.flatnonzero(draws.temperature == 0)
    likeliest = logits[_on(greedy, device)].argmax(-1) if len(greedy) else None
    if (draws.temperature != 1).any() and len(greedy) < len(logits):
        divisor = np.where(draws.temperature == 0, 1, draws.temperature).astype(np.float32)
        logits.div_(_on(divisor, device)[:, None])
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    uniform = _on(draws.uniform, device)
    sums = _block_sums(weights)
    total = sums.sum(-1, dtype=torch.float64)
    tokens = _by_blocks(weights, sums, uniform)
    cut = np.flatnonzero(((draws.top_k > 0) | (draws.top_p < 1)) & (draws.temperature != 0))
    if len(cut):
        rows = _on(cut, device)
        tokens[rows] = _among_likeliest(weights[rows], draws.top_k[cut], draws.top_p[cut], uniform[rows])
    if likeliest is not None:
        tokens[_on(greedy, device)] = likeliest
    chosen = weights.gather(1, tokens[:, None])[:, 0]
    return tokens, (chosen / total).log()


def _on(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


def _block_sums(weights: Tensor) -> Tensor:
    """weights [B, V] -> [B, ceil(V / BLOCK)] sums; the last block may be a short one."""
    whole = weights.shape[1] // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    if whole == weights.shape[1]:
        return sums
    return torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1)


def _by_blocks(weights: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """The entry at which the running sum of `weights` [B, V] first exceeds `uniform` [B] of the whole.

    Sums run in float64, over blocks and then within one: no likelihood is lost to rounding, and the
    vocabulary is read once.
    """
    block, rest = _first_above(sums, uniform)
    entries = block[:, None] * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, entries.clamp(max=weights.shape[1] - 1))
    inside = inside.masked_fill(entries >= weights.shape[1], 0)
    entry, _ = _first_above(inside, rest)
    return (block * BLOCK + entry).clamp_(max=weights.shape[1] - 1)


def _first_above(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Index [B] at which the running sum of `weights` [B, N] first exceeds `uniform` of the whole, and how far
    into that entry it lies, in [0, 1)."""
    running = weights.cumsum(-1, dtype=torch.float64)
    # Below one, so that the target lies below the whole and never in a last entry that weighs nothing.
    target = uniform[:, None].clamp(max=ALMOST_ONE) * running[:, -1:]
    index = torch.searchsorted(running, target, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(1, index).double()
    below = running.gather(1, index) - weight
    return index[:, 0], ((target - below) / weight).clamp_(0, ALMOST_ONE)[:, 0]


def _among_likeliest(weights: Tensor, top_k: np.ndarray, top_p: np.ndarray, uniform: Tensor) -> Tensor:
    """Tokens [B] drawn from `weights` [B, V] cut to the top_k likeliest, then to the smallest set holding top_p."""
    vocabulary = weights.shape[1]
    k = torch.from_numpy(np.where(top_k > 0, np.minimum(top_k, vocabulary), vocabulary)).to(weights.device)[:, None]
    p = torch.from_numpy(top_p.astype(np.float64)).to(weights.device)[:, None]
    # Sorting all of a large vocabulary is slow, and a nucleus is mostly small.
    widest = int(top_k.max()) if (top_k > 0).all() else max(NUCLEUS, int(top_k.max()))
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    for width in (min(widest, vocabulary), vocabulary):
        likeliest, tokens = weights.topk(width)
        kept = likeliest.double() * (torch.arange(width, device=weights.device) < k)
        running = kept.cumsum(-1)
        whole = torch.where(k <= width, running[:, -1:], total)
        if width == vocabulary or bool((running[:, -1:] >= p * whole).all()):
            break
    nucleus = kept * (running - kept < p * whole)
    return tokens.gather(1, _first_above(nucleus, uniform)[0][:, None])[:, 0]
