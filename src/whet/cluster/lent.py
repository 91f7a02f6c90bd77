"""What a cluster lends to the engines of a run: who started rank 0 says so in its environment."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from whet.engines.servers.machine import Machine

LENT = "WHET_CLUSTER"
"""Variable of rank 0's environment."""


@dataclass(frozen=True)
class Slot:
    """Room for one engine: a bundle of a placement group of this name, with GPUs to reserve in it (`gpus`), or those of
    ranks to share (`devices`)."""

    group: str
    bundle: int
    cpus: float = 0.0
    gpus: int = 0
    devices: str | None = None


@dataclass(frozen=True)
class Lent:
    """The cluster that a run is on, and its room for engines."""

    address: str
    namespace: str
    limit_s: float
    slots: tuple[Slot, ...]

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Lent:
        told = json.loads(text)
        return cls(**{**told, "slots": tuple(Slot(**slot) for slot in told["slots"])})


def lent_machines() -> Sequence[Machine]:
    """The machines that engines run on, one for each; none where this run is on no cluster."""
    told = os.environ.get(LENT)
    if told is None or not (lent := Lent.from_text(told)).slots:
        return ()
    from whet.cluster.ray.engines import machines

    return machines(lent)
