"""Tensors in buckets of bounded size, so that no more than one of them is on its way at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def num_bytes(tensor: Tensor) -> int:
    """Memory of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors in order, in lists of at most `max_bytes`; one that is larger comes alone.

    Each tensor is copied, for it is only valid until the next is asked for.
    """
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + num_bytes(tensor) > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach().clone(memory_format=torch.contiguous_format)))
        size += num_bytes(tensor)
    if bucket:
        yield bucket


def flat(bucket: Iterable[tuple[str, Tensor]]) -> Tensor:
    """The elements of a bucket as one stretch of bytes, in order."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in bucket])


def short(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
