"""The ways that weights take to servers: a folder, a process group, or memory of a GPU that both see."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from whet.config.engine import PublishConfig
from whet.engines.servers.bridge import Bridge
from whet.engines.servers.dialect import Bucket, Group
from whet.engines.servers.fleet import Fleet
from whet.engines.servers.server import Server
from whet.errors import EngineError
from whet.weights import group as groups
from whet.weights import handles
from whet.weights.buckets import buckets, flat, num_bytes, short
from whet.weights.delta import Changes, Deltas, metadata
from whet.weights.files import WeightFolder, Written

Tensors = Iterable[tuple[str, Tensor]]


class Transport(Protocol):
    """One way. `send` runs where the trainer does and asks the servers through the bridge."""

    async def send(self, tensors: Tensors, version: int) -> int:
        """Bring weights to all living servers, which stand still from `fleet.hold` on; the bytes that were sent."""
        ...

    def close(self) -> None: ...


class ByFile:
    """A complete set of safetensors files, or with `deltas` what has changed. The last set stays for a server that
    comes back."""

    def __init__(self, fleet: Fleet, bridge: Bridge, config: PublishConfig, folder: WeightFolder, *, delta: bool):
        self._fleet, self._bridge, self._config, self._folder = fleet, bridge, config, folder
        self._deltas = Deltas() if delta else None
        self._bucket_bytes = config.bucket_mb * 2**20
        self.last: Written | None = None

    async def send(self, tensors: Tensors, version: int) -> int:
        if self._deltas is None:
            written = self._folder.write(tensors, version, self._bucket_bytes)
        else:
            written = self._write_changes(self._deltas, tensors, version)
        await self._bridge.run(self._fleet.hold())
        await self._bridge.run(self._fleet.each(lambda server: self.load(server, written)))
        self._folder.keep_only(written)
        self.last = written
        return written.size

    async def load(self, server: Server, written: Written | None = None) -> None:
        """Let one server take in a set of weights, the last when not given."""
        written = written or self.last
        assert written is not None, "there is a set of weights to load"
        limit = self._config.timeout_s
        await server.dialect.begin(server.channel, limit)
        paths = [str(path) for path in written.files]
        await server.dialect.load_files(server.channel, str(written.folder), paths, limit)

    def for_newcomer(self) -> None:
        """What a server needs that knows none of the earlier sets: after changes, everything once more."""
        if self._deltas is not None and self._deltas.last:
            everything = Deltas()
            self.last = self._write_changes(everything, self._deltas.last.items(), 0)

    def _write_changes(self, deltas: Deltas, tensors: Tensors, version: int) -> Written:
        told: dict[str, dict[str, Any]] = {}

        def packed() -> Iterator[tuple[str, Tensor]]:
            for name, data, entry in deltas.encode(tensors):
                told[name] = entry
                yield name, data

        def describe(names: Iterable[str]) -> dict[str, str]:
            return metadata({name: told.pop(name) for name in names})

        return self._folder.write(packed(), version, self._bucket_bytes, describe)

    def close(self) -> None:
        self._folder.close()


class ByBroadcast:
    """Bucket by bucket from rank 0, the trainer, to every process of every server; with `delta`, what has changed."""

    def __init__(self, fleet: Fleet, bridge: Bridge, config: PublishConfig, device: torch.device):
        self._fleet, self._bridge, self._config, self._device = fleet, bridge, config, device
        self._group: Any = None
        self._store: Any = None
        """What the group lives on."""
        self._members: tuple[str, ...] = ()
        self._changes = Changes() if config.delta else None

    async def send(self, tensors: Tensors, version: int) -> int:
        await self._bridge.run(self._fleet.hold())
        await self._meet()
        await self._bridge.run(self._fleet.each(self._open))
        try:
            size = await self._pass(tensors, version)
            await self._bridge.run(self._fleet.each(self._close))
        except BaseException:
            if self._changes is not None:
                self._changes.forget()
            raise
        return size

    async def _pass(self, tensors: Tensors, version: int) -> int:
        size = 0
        tensors = tensors if self._changes is None else self._changes.of(tensors)
        for bucket in buckets(tensors, self._config.bucket_mb * 2**20):
            told = _described(bucket)
            moved = [(name, tensor.to(self._device)) for name, tensor in bucket]
            size += sum(num_bytes(tensor) for _, tensor in moved)
            await self._broadcast(moved, told, version)
        return size

    async def _broadcast(self, bucket: list[tuple[str, Tensor]], told: Bucket, version: int) -> None:
        limit = self._config.timeout_s
        dialect = self._fleet.servers[0].dialect
        group = self._group
        sent = [flat(bucket)] if dialect.receives_flat else [tensor.contiguous() for _, tensor in bucket]
        received = asyncio.ensure_future(
            self._bridge.run(
                self._fleet.each(lambda server: server.dialect.receive(server.channel, told, version, limit))
            )
        )
        sending = asyncio.ensure_future(self._bridge.aside(lambda: groups.broadcast(group, sent, limit)))
        try:
            done, _ = await asyncio.wait({received, sending}, return_when=asyncio.FIRST_EXCEPTION)
            for one in done:
                one.result()
            await asyncio.gather(received, sending)
        except BaseException:
            self._group, self._members = None, ()  # whoever is left in it waits for nobody
            received.cancel()
            raise

    async def _open(self, server: Server) -> None:
        await server.dialect.open_session(server.channel, self._config.timeout_s)

    async def _close(self, server: Server) -> None:
        await server.dialect.close_session(server.channel, self._config.timeout_s)

    async def _meet(self) -> None:
        """A group of us and the servers that live, made anew when others do."""
        servers = self._fleet.living
        members = tuple(f"{server.channel.address} {server.restarts}" for server in servers)
        if self._group is not None and members == self._members:
            return
        self._group = None
        if self._changes is not None:
            self._changes.forget()
        address = groups.own_address(servers[0].channel.host)
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        size = 1 + sum(server.world_size for server in servers)
        name, limit = f"whet-{uuid.uuid4().hex}", self._config.timeout_s  # a server never forgets a name
        meeting = Group(address, groups.free_port(), size, backend, name, limit)
        offsets, offset = {}, 1
        for server in servers:
            offsets[server.index] = offset
            offset += server.world_size

        async def joins(server: Server) -> None:
            await server.dialect.join(server.channel, meeting, offsets[server.index], limit)

        joined = asyncio.ensure_future(self._bridge.run(self._fleet.each(joins)))
        opened = asyncio.ensure_future(
            self._bridge.aside(lambda: groups.join(address, meeting.port, size, backend, name, limit))
        )
        await asyncio.wait({joined, opened}, return_when=asyncio.FIRST_EXCEPTION)
        if joined.done():
            joined.result()  # whoever does not join tells why, where we only wait
        (self._group, self._store), _ = await asyncio.gather(opened, joined)
        self._members = members

    def close(self) -> None:
        self._group = None


class ByHandle:
    """Buckets in memory of the GPU that trainer and servers share: only where they lie is sent."""

    def __init__(self, fleet: Fleet, bridge: Bridge, config: PublishConfig, device: torch.device):
        if device.type != "cuda":
            raise EngineError(
                "engine.publish.by is shared, which needs a GPU that trainer and servers are on; use file"
            )
        self._fleet, self._bridge, self._config, self._device = fleet, bridge, config, device

    async def send(self, tensors: Tensors, version: int) -> int:
        await self._bridge.run(self._fleet.hold())
        limit, size = self._config.timeout_s, 0
        await self._bridge.run(self._fleet.each(lambda server: server.dialect.begin(server.channel, limit)))
        await self._bridge.run(self._fleet.each(lambda server: server.dialect.open_session(server.channel, limit)))
        for bucket in buckets(tensors, self._config.bucket_mb * 2**20):
            moved = [(name, tensor.to(self._device)) for name, tensor in bucket]
            told, is_flat = _described(moved), self._fleet.servers[0].dialect.receives_flat
            buffer = flat(moved) if is_flat else None
            handle = handles.of_buffer(buffer) if buffer is not None else handles.of_tensors(moved)
            torch.cuda.synchronize(self._device)
            await self._bridge.run(self._fleet.each(lambda s, t=told, h=handle: self._open(s, t, h)))
            size += sum(num_bytes(tensor) for _, tensor in moved)
            del buffer, moved
            torch.cuda.ipc_collect()
        await self._bridge.run(self._fleet.each(lambda server: server.dialect.close_session(server.channel, limit)))
        return size

    async def _open(self, server: Server, told: Bucket, handle: str) -> None:
        copies = [handle] * server.world_size
        await server.dialect.open(server.channel, told, copies, self._config.timeout_s)

    def close(self) -> None:
        pass


def _described(bucket: list[tuple[str, Tensor]]) -> Bucket:
    names = [name for name, _ in bucket]
    return Bucket(names, [short(tensor.dtype) for _, tensor in bucket], [list(tensor.shape) for _, tensor in bucket])


def adapter_folder(place: Path, tensors: Tensors, config: str, version: int) -> Written:
    """An adapter as peft saves it, for servers that take adapters."""
    from safetensors.torch import save_file

    folder = place / f"adapter-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors}
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(config, encoding="utf-8")
    size = sum(map(num_bytes, held.values()))
    return Written(folder, (folder / "adapter_model.safetensors",), size)
