"""Keys and values of requests that have ended, for later requests that begin with the same tokens: the next turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from whet.engines.local.cache import Layers, SlotCache
from whet.engines.local.pages import PagedCache

MIN_REUSED = 16
"""Shorter beginnings are computed anew: to copy them costs as much. What is looked up is found by its first so many."""


@dataclass(eq=False)
class Kept:
    """Tokens, and the keys and values of each of them in every layer."""

    tokens: np.ndarray
    layers: Layers
    num_bytes: int


class KeptPrefixes:
    """At most `max_bytes` of keys and values; what was not used for the longest time goes first.

    Nothing here knows of weights: whoever changes them clears it.
    """

    def __init__(self, cache: SlotCache | PagedCache, max_bytes: int):
        self.cache, self.max_bytes = cache, max_bytes
        self.clear()

    def clear(self) -> None:
        """Let go of all memory."""
        self.num_bytes = 0
        self._entries: OrderedDict[Kept, None] = OrderedDict()  # the least recently used first
        self._by_head: dict[bytes, list[Kept]] = {}

    def keep(self, tokens: Sequence[int], slot: int) -> None:
        """Keep what a slot holds of these tokens. Entries that they begin with are contained in it and go."""
        size = self.cache.num_bytes(len(tokens))
        if len(tokens) < MIN_REUSED or not 0 < size <= self.max_bytes:
            return
        array = np.asarray(tokens)
        for entry in list(self._by_head.get(_head(array), ())):
            shared = num_shared(entry.tokens, array)
            if shared == len(array):
                self._entries.move_to_end(entry)
                return
            if shared == len(entry.tokens):
                self._drop(entry)
        while self.num_bytes + size > self.max_bytes:
            self._drop(next(iter(self._entries)))
        entry = Kept(array, self.cache.read(slot, len(array)), size)
        self._entries[entry] = None
        self._by_head.setdefault(_head(array), []).append(entry)
        self.num_bytes += size

    def find(self, tokens: np.ndarray) -> tuple[Kept | None, int]:
        """The entry that has the most tokens in common with the beginning of these, and how many."""
        best, most = None, 0
        for entry in self._by_head.get(_head(tokens), ()):
            if (shared := num_shared(entry.tokens, tokens)) > most:
                best, most = entry, shared
        return best, most

    def load(self, entry: Kept, slot: int, length: int) -> None:
        """Write the first `length` positions of an entry to a slot."""
        self._entries.move_to_end(entry)
        self.cache.write(slot, entry.layers, length)

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, entry: Kept) -> None:
        del self._entries[entry]
        siblings = self._by_head[_head(entry.tokens)]
        siblings.remove(entry)
        if not siblings:
            del self._by_head[_head(entry.tokens)]
        self.num_bytes -= entry.num_bytes


def num_shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def _head(tokens: np.ndarray) -> bytes:
    return tokens[:MIN_REUSED].tobytes()
