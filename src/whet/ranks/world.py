"""The processes that train together: how they find one another, and what they know of each other."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from whet.errors import ClusterError
from whet.ranks.environment import ADDRESS, LOCAL_RANK, PORT, RANK, SIZE
from whet.ranks.watch import Watch


class World:
    """This process among those that train together. Rank 0 leads; the others do as it says.

    `join` meets the others. Objects go from the leader to all, and from all to the leader; collectives of the backends
    go through the process group that PyTorch holds, which has the same limit.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, control: dist.ProcessGroup, watch: Watch) -> None:
        self.rank, self.size = rank, size
        self._store, self._control, self.watch = store, control, watch
        self._given = self._taken = 0

    @classmethod
    def join(cls, *, start_timeout_s: float, timeout_s: float) -> World:
        """Meet the processes that the environment speaks of. On a machine with GPUs each takes one of its own.

        Raises ClusterError naming those that did not come in time.
        """
        rank, size = int(os.environ[RANK]), int(os.environ[SIZE])
        address, port = os.environ[ADDRESS], int(os.environ[PORT])
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(int(os.environ.get(LOCAL_RANK, rank)) % torch.cuda.device_count())
        store = _meet(address, port, rank, size, start_timeout_s)
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            store=dist.PrefixStore("collectives", store),
            rank=rank,
            world_size=size,
            timeout=limit,
        )
        control = dist.new_group(backend="gloo", timeout=limit)
        assert isinstance(control, dist.ProcessGroup), "every rank is a member of the group of all"
        watch = Watch(address, port, rank, size, timeout_s)
        watch.start()
        return cls(rank, size, store, control, watch)

    # --- from the leader to all --------------------------------------------------------------------------

    def command(self, words: Any) -> None:
        """The leader says what all do next."""
        self._store.set(f"command/{self._given}", pickle.dumps(words))
        if self._given > 1:  # what all have long taken
            self._store.delete_key(f"command/{self._given - 2}")
        self._given += 1

    def next_command(self) -> Any:
        """Wait for what the leader says, however long it is busy elsewhere. Raises ClusterError when it is gone."""
        key = f"command/{self._taken}"
        while True:
            try:
                self._store.wait([key], timedelta(seconds=30))
                break
            except dist.DistStoreError:  # nothing yet
                self.watch.check_leader()
            except dist.DistNetworkError as error:
                raise ClusterError("the leader, rank 0, is gone") from error
        self._taken += 1
        return pickle.loads(self._store.get(key))

    def scatter(self, parts: Sequence[Any] | None) -> Any:
        """Each rank its own part of what the leader has."""
        received: list[Any] = [None]
        dist.scatter_object_list(received, None if parts is None else [*parts], src=0, group=self._control)
        return received[0]

    def gather(self, result: Any) -> list[Any]:
        """What every rank brings, by rank; empty for all but the leader."""
        found: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(result, found if self.rank == 0 else None, dst=0, group=self._control)
        return found

    def leave(self) -> None:
        """Go, once all are ready to."""
        self.watch.stop()
        dist.destroy_process_group()


def _meet(address: str, port: int, rank: int, size: int, timeout_s: float) -> dist.TCPStore:
    """The store that all ranks share, once all are there."""
    deadline = time.monotonic() + timeout_s
    # torchrun's agent holds the store itself.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        limit = timedelta(seconds=timeout_s)
        store = dist.TCPStore(address, port, is_master=hosts, timeout=limit, wait_for_workers=False)
        store.set(f"joined/{rank}", f"{socket.gethostname()}, pid {os.getpid()}")
        for other in range(size):
            store.wait([f"joined/{other}"], timedelta(seconds=max(1.0, deadline - time.monotonic())))
    except dist.DistNetworkError as error:
        raise ClusterError(
            f"rank {rank} cannot reach rank 0 at {address}:{port} within {timeout_s:g} s ({error}); see whether it "
            "runs, and whether another program has that port"
        ) from error
    except dist.DistStoreError:
        missing = [str(other) for other in range(size) if not store.check([f"joined/{other}"])]
        raise ClusterError(
            f"rank {rank} waited {timeout_s:g} s for all {size} processes (cluster.start_timeout_s), but rank "
            f"{', '.join(missing)} did not come; see what the log of that process says"
        ) from None
    return store
