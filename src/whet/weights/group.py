"""The process group in which the trainer, rank 0, broadcasts weights to the processes of engines."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from whet.errors import EngineError


def join(address: str, port: int, size: int, backend: str, name: str, timeout_s: float) -> tuple[Any, dist.TCPStore]:
    """Open the group, wait for the others, and return it with the store that it lives on.

    It stands beside the trainer's own groups, if there are any. Raises EngineError when not all have come within the
    limit.
    """
    # As SGLang joins (and every trainer that feeds it): a group without a world that it would be a part of.
    from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

    limit = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(address, port, size, is_master=True, timeout=limit, wait_for_workers=False)
        group, _ = _new_process_group_helper(
            size, 0, [], Backend(backend), PrefixStore(name, store), group_name=name, timeout=limit
        )
    except (RuntimeError, dist.DistError) as error:
        raise EngineError(
            f"the group of trainer and engines ({address}:{port}, {size} processes, {backend}) did not come together "
            f"within {timeout_s:g} s: {error}; see the engines' logs, or set engine.publish.by to file"
        ) from error
    _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group, store


def broadcast(group: Any, tensors: Iterable[Tensor], timeout_s: float) -> None:
    """Send tensors to all others, in order. Raises EngineError when one does not take them in within the limit."""
    try:
        works = [dist.broadcast(tensor, src=0, group=group, async_op=True) for tensor in tensors]
        for work in works:
            if work is not None:
                work.wait(timedelta(seconds=timeout_s))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except (RuntimeError, dist.DistError) as error:
        raise EngineError(f"weights were not taken in within {timeout_s:g} s of their broadcast: {error}") from error


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def own_address(peer: str) -> str:
    """Our address as a machine of this name sees it."""
    if peer in ("127.0.0.1", "localhost", "::1"):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return probe.getsockname()[0]
