"""A micro-batch's stream of tokens in slices, one for each rank that shares it, and attention over the whole.

Everything but attention works on each token by itself and runs on slices. Around attention ranks exchange heads for
stream (DeepSpeed-Ulysses, arXiv:2309.14509): each attends with a part of the heads over the whole stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from whet import tree
from whet.backends.exchange import gather_stream, heads_for_stream, stream_for_heads, sum_alike
from whet.tensor.segments import Segments
from whet.tree import Tree


class Slices:
    """How ranks share streams: each takes a slice; `tensor` ranks share the matrices of layers, `context` ranks the
    heads of attention beyond that; `sharing` are all of them.

    Slices of `tensor` ranks lie side by side, so that together they are a slice of their context rank.
    """

    def __init__(self, context: ProcessGroup, tensor: ProcessGroup, sharing: ProcessGroup):
        self.context, self.tensor, self.sharing = context, tensor, sharing
        self.count = sharing.size()
        self.index = context.rank() * tensor.size() + tensor.rank()
        self.active = False
        """Whether what runs through the model is slices; else each rank runs the same whole rows."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Forward and backward passes within this context are over slices."""
        before, self.active = self.active, True
        try:
            yield
        finally:
            self.active = before

    def padded(self, stream: Tree) -> Tree:
        """The tree with a segment of padding in the end, so that it can be cut into equal slices."""
        lacking = -stream.num_tokens % self.count
        if not lacking:
            return stream
        padding = tree.flat([np.zeros(lacking, dtype=np.int64)])
        joined = tree.join([stream, padding])
        return Tree(joined.tokens, joined.position_ids, joined.starts, joined.parents, stream.index)

    def own(self, length: int) -> slice:
        """This rank's part of a stream of so many tokens."""
        size = length // self.count
        return slice(self.index * size, (self.index + 1) * size)

    def combine(self, values: Tensor, own: Tensor, count: int) -> Tensor:
        """[k, ...] that stand at the places `own` [k] of `count`, from every rank -> [count, ...] on every rank."""
        kind = values.dtype
        values = values.to(torch.int64) if kind == torch.bool else values
        whole = values.new_zeros(count, *values.shape[1:]).index_copy(0, own, values)
        return sum_alike(whole, self.sharing).to(kind)


class SlicedSegments:
    """The attention context of one micro-batch in slices."""

    def __init__(self, stream: Tree, slices: Slices, device: torch.device):
        self.whole, self.slices = Segments(stream, device), slices
        self._wide: dict[int, tuple[Tensor, Tensor]] = {}

    def widened(self, x: Tensor) -> Tensor:
        """What goes with the tokens of a slice, such as rotations [1, n, ...], for those of all tensor ranks."""
        if id(x) not in self._wide:  # the same for all layers
            self._wide[id(x)] = x, gather_stream(x, self.slices.tensor)
        return self._wide[id(x)][1]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **options
    ) -> Tensor:
        """query [1, H, n, D], key and value [1, Hkv, n, D] -> [1, n, H, D] (see AttentionContext)."""
        group, heads = self.slices.context, query.shape[1]
        ranks = group.size()
        if torch.is_autocast_enabled(query.device.type):  # as `Segments` does, before anything is sent
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if repeat := _repetition(key.shape[1], ranks):
            key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
        if (sinks := options.get("s_aux")) is not None:  # one for each head
            first = group.rank() * (heads // ranks)
            options["s_aux"] = sinks[first : first + heads // ranks]
        query, key, value = (heads_for_stream(x, group) for x in (query, key, value))
        return stream_for_heads(self.whole.attend(module, query, key, value, scaling, **options), group)


def _repetition(heads: int, ranks: int) -> int:
    """How often to repeat each head of keys for every rank to have those that its queries look at; 0: they divide."""
    return 0 if heads % ranks == 0 else ranks // math.gcd(heads, ranks)
