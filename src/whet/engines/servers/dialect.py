"""What engines ask of the kinds of servers there are, each in its own words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from whet.config.engine import EngineConfig
from whet.engines.servers.http import Channel
from whet.types import FinishReason, Sampling, VersionSpan


@dataclass(frozen=True, slots=True)
class Start:
    """What a server is started with: `model` is the folder of its weights, `dtype` what it computes in."""

    model: str
    dtype: str
    max_concurrent: int
    seed: int
    device: str
    adapter_rank: int | None = None
    """Rank of the adapter that it is to take in; None where there is none."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One completion asked of a server."""

    id: str
    tokens: Sequence[int]
    sampling: Sampling
    stop_token_ids: Sequence[int]
    """The model's own ends of a sequence."""
    version: int
    """The weights that prompts' keys and values may have been computed with: others are not to be reused."""
    adapter: str | None = None
    """Name of the adapter to sample with."""


@dataclass(frozen=True, slots=True)
class News:
    """What is new since the last event of a streamed answer. `versions` are spans as the server names them, where it
    does so: of the whole completion."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None = None
    versions: tuple[tuple[str, int, int], ...] | None = None


class Dialect(Protocol):
    """How one kind of server is started and spoken to. Every question has a limit, and raises EngineError."""

    name: str
    checks_weights: bool
    """Whether `bits` tells sums that the trainer can form as well."""
    stops_with_ignore_eos: bool
    """Whether stop tokens that are asked for count where a model's own ends are to be ignored."""
    receives_flat: bool
    """Whether a bucket is taken in as one stretch of bytes, or tensor by tensor."""
    reads_deltas: bool
    """Whether it takes in files that hold only what has changed."""

    def command(self, config: EngineConfig, start: Start, host: str, port: int) -> list[str]:
        """The arguments of the Python that runs the server, which listens at this address of its machine."""
        ...

    def environment(self, config: EngineConfig, start: Start) -> Mapping[str, str]:
        """Variables that are set for it."""
        ...

    def request(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """Path and body of a completion that is streamed."""
        ...

    def news(self, event: Mapping[str, Any], told: int) -> News:
        """What an event says, of which `told` tokens are known."""
        ...

    async def ready(self, channel: Channel, timeout_s: float) -> None:
        """Raises Unreachable unless the server lives."""
        ...

    async def working(self, channel: Channel, timeout_s: float) -> None:
        """Raises Unreachable unless what computes behind the server answers too."""
        ...

    async def max_length(self, channel: Channel, timeout_s: float) -> int | None:
        """Most tokens of a prompt and its completion together."""
        ...

    async def world_size(self, channel: Channel, timeout_s: float) -> int:
        """Processes that hold a part of the server's weights."""
        ...

    async def pause(self, channel: Channel, timeout_s: float) -> None:
        """Sample nothing; requests stay where they are."""
        ...

    async def resume(self, channel: Channel, timeout_s: float) -> None: ...

    async def abort(self, channel: Channel, ids: Sequence[str], timeout_s: float) -> None:
        """End these requests with the tokens they have."""
        ...

    async def begin(self, channel: Channel, timeout_s: float) -> None:
        """New weights are about to come."""
        ...

    async def open_session(self, channel: Channel, timeout_s: float) -> None:
        """Weights are about to be sent piece by piece."""
        ...

    async def close_session(self, channel: Channel, timeout_s: float) -> None:
        """All pieces have been sent."""
        ...

    async def load_files(self, channel: Channel, folder: str, paths: Sequence[str], timeout_s: float) -> None:
        """Take in the weights of these files, all in one folder that is a complete model."""
        ...

    async def join(self, channel: Channel, group: Group, offset: int, timeout_s: float) -> None:
        """Join the process group that weights are broadcast in, `offset` being the rank of the first process."""
        ...

    async def receive(self, channel: Channel, bucket: Bucket, version: int, timeout_s: float) -> None:
        """Take in a bucket that is broadcast meanwhile."""
        ...

    async def open(self, channel: Channel, bucket: Bucket, handles: Sequence[str], timeout_s: float) -> None:
        """Take in a bucket that lies in shared memory of a GPU."""
        ...

    async def finish(self, channel: Channel, version: int, timeout_s: float) -> None:
        """All weights have come: sample with them."""
        ...

    async def label(self, channel: Channel, version: int, timeout_s: float) -> None:
        """Call the weights that are there by this version."""
        ...

    async def version(self, channel: Channel, timeout_s: float) -> str | None:
        """What the server calls the version of its weights; None where it does not tell."""
        ...

    async def bits(self, channel: Channel, timeout_s: float) -> list[dict[str, Any]]:
        """What the server says of the weights that each of its processes holds, by the names of its parameters."""
        ...

    async def load_adapter(self, channel: Channel, name: str, folder: str, timeout_s: float) -> None: ...

    async def unload_adapter(self, channel: Channel, name: str, timeout_s: float) -> None: ...

    async def sleep(self, channel: Channel, timeout_s: float) -> None:
        """Give up the memory of weights and caches."""
        ...

    async def wake(self, channel: Channel, timeout_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Group:
    """Where the process group of trainer and servers meets."""

    address: str
    port: int
    size: int
    backend: str
    name: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that are sent together: what the other side must know of them."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


def spans(told: Sequence[tuple[str, int, int]], known: Mapping[str, int]) -> tuple[VersionSpan, ...] | None:
    """Spans by the versions that were published; None where the server names one that was not."""
    if any(name not in known for name, _, _ in told):
        return None
    return tuple(VersionSpan(known[name], start, end) for name, start, end in told if end > start)


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as they stand on a command line: true alone, false left out, a list as several values."""
    found: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True or value is None:
            found.append(flag)
        elif isinstance(value, list | tuple):
            found += [flag, *map(str, value)]
        elif value is not False:
            found += [flag, _written(value)]
    return found


def _written(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)
