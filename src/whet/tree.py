"""Rows <-> prefix tree: token sequences with every shared prefix standing once.

The tree is a physical token stream cut into segments. A segment has at most one parent; a token sees
the tokens of its segment's ancestors and those before it in its own segment, exactly what it would see
in its row. `index` leads from every token of every row to its place in the stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

MIN_SAVED_TOKENS = 16
"""A shared prefix becomes a segment of its own when that saves at least so many tokens of computation;
below, the extra attention call costs more than it saves."""


@dataclass(frozen=True)
class Tree:
    """Segments of a physical token stream with P tokens and S segments, standing for rows of T tokens in all.

    tokens, position_ids: [P]. starts: [S + 1], segment s is [starts[s], starts[s + 1]). parents: [S], -1 at a
    root, always smaller than the segment's own number. index: [T], the place of each token of the rows.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    starts: np.ndarray
    parents: np.ndarray
    index: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def predecessors(self) -> np.ndarray:
        """[P] the place whose hidden state predicts each token; -1 at the start of a row."""
        before = np.arange(-1, self.num_tokens - 1)
        firsts, parents = self.starts[:-1], self.parents
        before[firsts] = np.where(parents >= 0, self.starts[parents + 1] - 1, -1)
        return before

    def ancestors(self, segment: int) -> list[int]:
        """The segments above this one, root first."""
        path: list[int] = []
        segment = int(self.parents[segment])
        while segment >= 0:
            path.append(segment)
            segment = int(self.parents[segment])
        return path[::-1]


def build(rows: Sequence[np.ndarray], *, min_saved: int = MIN_SAVED_TOKENS) -> Tree:
    """The prefix tree of these rows (each [length] integers, none empty).

    Prefixes are shared at any depth wherever that saves at least `min_saved` tokens.
    """
    rows = [np.asarray(row, dtype=np.int64) for row in rows]
    row_starts = [0, *accumulate(map(len, rows))]
    index = np.empty(row_starts[-1], dtype=np.int64)
    tokens: list[np.ndarray] = []
    parents: list[int] = []
    starts = [0]
    # Members of a node agree on all tokens before `depth`, which stand in segment `parent` and above.
    nodes = deque([(list(range(len(rows))), 0, -1)])
    while nodes:
        members, depth, parent = nodes.popleft()
        end = _shared_end([rows[m] for m in members], depth)
        if len(members) == 1 or (end - depth) * (len(members) - 1) >= min_saved:
            places = np.arange(starts[-1], starts[-1] + end - depth)
            for m in members:
                index[row_starts[m] + depth : row_starts[m] + end] = places
            tokens.append(rows[members[0]][depth:end])
            parents.append(parent)
            starts.append(starts[-1] + end - depth)
            nodes.extend((group, end, len(parents) - 1) for group in _branches(rows, members, end, keep_ended=False))
        else:  # too little in common: each branch carries its own copy
            nodes.extend((group, depth, parent) for group in _branches(rows, members, end, keep_ended=True))
    positions = np.empty(starts[-1], dtype=np.int64)
    positions[index] = np.concatenate([np.arange(len(row)) for row in rows])
    return Tree(np.concatenate(tokens), positions, np.asarray(starts), np.asarray(parents), index)


def _shared_end(rows: list[np.ndarray], depth: int) -> int:
    """The first position at or after `depth` at which these rows differ or one of them ends."""
    first = rows[0]
    end = min(map(len, rows))
    for row in rows[1:]:
        differs = np.flatnonzero(first[depth:end] != row[depth:end])
        if len(differs):
            end = depth + int(differs[0])
    return end


def _branches(rows: list[np.ndarray], members: list[int], end: int, *, keep_ended: bool) -> list[list[int]]:
    """Members grouped by their token at `end`; those that end there stand alone, or are done with."""
    branches: dict[int, list[int]] = {}
    for m in members:
        if len(rows[m]) > end:
            branches.setdefault(int(rows[m][end]), []).append(m)
        elif keep_ended:
            branches[-1 - m] = [m]
    return list(branches.values())


def flat(rows: Sequence[np.ndarray]) -> Tree:
    """The tree that shares nothing: one segment per row (packing without prefix sharing)."""
    lengths = [len(row) for row in rows]
    tokens = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    positions = np.concatenate([np.arange(n) for n in lengths])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tree(tokens, positions, starts, np.full(len(rows), -1), np.arange(len(tokens)))


def cut(tree: Tree, rows: Sequence[np.ndarray], max_tokens: int) -> list[tuple[Tree, int]]:
    """The tree of these rows as trees of consecutive rows with at most `max_tokens` tokens each, and how many rows are
    in each; a longer row has a tree of its own, and what fits stays as it is."""
    if tree.num_tokens <= max_tokens:
        return [(tree, len(rows))]
    lay_out = flat if tree.num_tokens == len(tree.index) else build
    found, start = [], 0
    while start < len(rows):
        end, own = start + 1, lay_out(rows[start : start + 1])
        while end < len(rows) and (longer := lay_out(rows[start : end + 1])).num_tokens <= max_tokens:
            end, own = end + 1, longer
        found.append((own, end - start))
        start = end
    return found


def join(trees: Sequence[Tree]) -> Tree:
    """Several trees side by side in one stream."""
    if len(trees) == 1:
        return trees[0]
    token_offsets = np.cumsum([0, *(t.num_tokens for t in trees)])
    segment_offsets = np.cumsum([0, *(len(t.parents) for t in trees)])
    parents = [np.where(t.parents < 0, -1, t.parents + o) for t, o in zip(trees, segment_offsets, strict=False)]
    return Tree(
        np.concatenate([t.tokens for t in trees]),
        np.concatenate([t.position_ids for t in trees]),
        np.concatenate([*(t.starts[:-1] + o for t, o in zip(trees, token_offsets, strict=False)), token_offsets[-1:]]),
        np.concatenate(parents),
        np.concatenate([t.index + o for t, o in zip(trees, token_offsets, strict=False)]),
    )
