"""Decoding steps as CUDA graphs: one launch in place of the hundreds of a step, which take longer than their work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whet.engines.local.cache import LENGTH_BLOCK, SlotCache
from whet.engines.local.contexts import Decode
from whet.engines.local.paged import PagedDecode
from whet.engines.local.pages import PagedCache
from whet.tensor.attention import AttentionContext

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""Graphs kept at a time; beyond, all are captured anew as they are needed."""

Call = Callable[[Tensor, Tensor, AttentionContext], Tensor]
"""The decoder: tokens and positions [B, 1] -> hidden states [B, 1, H]."""


class DecodeGraphs:
    """Graphs by number of rows (powers of two) and by length of what they look at (blocks of the cache).

    A graph holds addresses: of the cache, which may grow, and of the weights, whose content may change but which may
    be moved as well. When any has changed, all graphs go. Rows that only fill up a bucket write to slots, or to a page,
    that nobody has. Where a model cannot be captured, that is said once and it runs as before.
    """

    def __init__(self, call: Call, cache: SlotCache | PagedCache, weights: Sequence[Tensor], device: torch.device):
        self.call, self.cache, self.weights, self.device = call, cache, weights, device
        self.works = True
        self.clear()

    def clear(self) -> None:
        """Let go of the graphs and their memory."""
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._addresses: tuple[int, ...] = ()

    def decode(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor | None:
        """One token [B] at its position [B] for each of the first B slots -> hidden states [B, H].

        None where this step is to be run without a graph: then the cache is made first, or capturing has failed.
        """
        rows = min(1 << (len(tokens) - 1).bit_length(), self.cache.max_rows)
        length = -(-(int(positions.max()) + 1) // LENGTH_BLOCK) * LENGTH_BLOCK
        length = length if self.cache.max_length is None else min(length, self.cache.max_length)
        self.cache.reserve(rows, length)
        if not self.works or not self.cache.addresses:
            return None
        addresses = *self.cache.addresses, *(weight.data_ptr() for weight in self.weights)
        if addresses != self._addresses or len(self._graphs) >= MAX_GRAPHS:
            self.clear()
            self._addresses = addresses
        graph = self._graphs.get((rows, length))
        if graph is None:
            try:
                kind = _PagedGraph if isinstance(self.cache, PagedCache) else _Graph
                graph = self._graphs[rows, length] = kind(self.call, self.cache, rows, length, self.device)
            except Exception as error:  # whatever a model's code does that a graph cannot hold
                self.works = False
                self.clear()
                logger.warning("decoding runs without CUDA graphs: %s: %s", type(error).__name__, error)
                return None
        return graph.replay(tokens, positions)


class _Graph:
    """One captured step for `rows` rows, each looking at its first `length` positions at most."""

    def __init__(self, call: Call, cache: Any, rows: int, length: int, device: torch.device):
        self.cache, self.length = cache, length
        self.tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        with self._kept(rows):
            self._replay, self._hidden = capture(lambda: call(self.tokens, self.positions, self._context()))

    @contextmanager
    def _kept(self, rows: int) -> Iterator[None]:
        """Slots that are in use survive the runs that come before the first replay."""
        saved = [(held, held[:rows, :, 0].clone()) for held in self.cache.tensors]
        try:
            yield
        finally:
            for held, first in saved:
                held[:rows, :, 0] = first

    def _context(self) -> AttentionContext:
        return _Static(self.cache, self.positions[:, 0], self.length)

    def replay(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        """Hidden states [B, H]; good until the next replay."""
        count = len(tokens)
        self.tokens.zero_()
        self.positions.zero_()
        self.tokens[:count, 0] = torch.from_numpy(tokens).to(self.tokens.device)
        self.positions[:count, 0] = torch.from_numpy(positions).to(self.positions.device)
        self._replay()
        return self._hidden[:count, 0]


class _PagedGraph(_Graph):
    """One captured step over pages: their numbers are filled in for every replay, SCRATCH where nobody is."""

    def __init__(self, call: Call, cache: PagedCache, rows: int, length: int, device: torch.device):
        self.tables = torch.from_numpy(np.zeros_like(cache.tables(range(rows), length))).to(device)
        super().__init__(call, cache, rows, length, device)

    def _kept(self, rows: int) -> AbstractContextManager[None]:
        return nullcontext()  # until the first replay all write to SCRATCH

    def _context(self) -> AttentionContext:
        return PagedDecode(self.cache, self.tables, self.positions[:, 0], self.length)

    def replay(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        """Hidden states [B, H]; good until the next replay."""
        self.tables.zero_()
        tables = torch.from_numpy(self.cache.tables(range(len(tokens)), self.length))
        self.tables[: len(tokens)] = tables.to(self.tables.device)
        return super().replay(tokens, positions)


class _Static(Decode):
    """Decoding whose positions lie in a tensor that is filled anew for every replay, and whose shapes stay."""

    def __init__(self, cache: SlotCache, positions: Tensor, length: int):
        self.cache, self.positions, self.length = cache, positions, length
        self.slots = torch.arange(len(positions), device=positions.device)
        self._masks = {}
        self._blocks = [(0, len(positions), length)]


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Run a step twice on a stream of its own, so that libraries have set themselves up, then capture it.

    Returns what replays it, and where its result then lies. Casts of autocast are captured too: those that it keeps
    from an earlier call would be freed under the graph.
    """
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may be training
            hidden = step()
    return graph.replay, hidden
