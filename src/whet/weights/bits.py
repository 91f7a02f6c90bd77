"""Sums over the bits of weights, which do not change when tensors are fused, cut up, transposed or padded with zeros.

So what the trainer sent can be held against what an engine holds, whose layers look otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> int:
    """The sum of a tensor's elements, their bits read as whole numbers."""
    return int(tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))


def group_of(name: str) -> str:
    """What a tensor belongs to: its layer, or itself where it is in none. Engines fuse within layers only."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found.group(1) if found else name.removesuffix(".weight")


class Sums:
    """The sum over each group, formed as tensors go by."""

    def __init__(self) -> None:
        self.groups: dict[str, list[int]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Count one tensor."""
        self.put(name, bits(tensor), tensor.numel())

    def put(self, name: str, total: int, count: int) -> None:
        """Count one tensor by its sum and its number of elements."""
        entry = self.groups.setdefault(group_of(name), [0, 0])
        entry[0] += total
        entry[1] += count


def of_engine(ranks: Sequence[Mapping[str, Sequence[int]]]) -> Sums:
    """The sums over what the processes of an engine hold: parts of a tensor add up, copies of it count once."""
    sums = Sums()
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        parts = [tuple(rank[name]) for rank in ranks if name in rank]
        if len(parts) > 1 and len(set(parts)) == 1:
            parts = parts[:1]
        sums.put(name, sum(total for total, _ in parts), sum(count for _, count in parts))
    return sums


def differing(sent: Sums, held: Sums) -> tuple[list[str], int]:
    """Groups of which the engine holds other bits; and how many could be compared.

    An engine may hold more elements, which are zeros then; one that holds fewer has made something else of them.
    """
    compared = [name for name, (_, count) in sent.groups.items() if held.groups.get(name, [0, -1])[1] >= count]
    return [name for name in compared if sent.groups[name][0] != held.groups[name][0]], len(compared)
