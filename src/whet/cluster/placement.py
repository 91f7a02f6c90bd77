"""What a run asks of a cluster: bundles of CPUs and GPUs that each lie on one node, and who goes into which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whet.config.parallel_rules import SERVERS
from whet.config.run import RunConfig
from whet.errors import ConfigError


@dataclass(frozen=True)
class Bundle:
    """CPUs and GPUs of one node."""

    cpus: float
    gpus: int = 0

    @property
    def resources(self) -> dict[str, float]:
        """The same as Ray names it."""
        return {"CPU": self.cpus} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def __str__(self) -> str:
        cpus = f"{self.cpus:g} CPU{'s' if self.cpus != 1 else ''}"
        return f"{_gpus(self.gpus)} and {cpus}" if self.gpus else cpus


@dataclass(frozen=True)
class Plan:
    """The bundles of a run. `per_bundle` training processes go into each of `training`, which are on nodes of their
    own if `apart` says so. Engines have bundles of their own, or share those that train (`colocated`)."""

    training: tuple[Bundle, ...]
    per_bundle: int
    apart: bool
    engines: tuple[Bundle, ...] = ()
    colocated: int = 0
    """Engines on the GPUs that train."""
    devices_per_engine: int = 0

    @property
    def size(self) -> int:
        """Processes that train."""
        return len(self.training) * self.per_bundle

    def __str__(self) -> str:
        asked = f"{len(self.training)} x ({self.training[0]}) to train"
        asked += ", each on a node of its own" if self.apart else ""
        return asked + (f", and {len(self.engines)} x ({self.engines[0]}) for engines" if self.engines else "")


@dataclass(frozen=True)
class Node:
    """A node of the cluster and what it has, whether in use or not."""

    id: str
    address: str
    resources: Mapping[str, float]

    def __str__(self) -> str:
        cpus, gpus = self.resources.get("CPU", 0.0), self.resources.get("GPU", 0.0)
        return f"{self.address} ({self.id[:8]}) with {_gpus(int(gpus))} and {cpus:g} CPUs"


def plan(config: RunConfig, *, has_gpus: bool) -> Plan:
    """What this run asks for. Every process has a GPU where the cluster has any and the run does not rule them out.

    Raises ConfigError for a colocated engine that would span nodes.
    """
    cluster, engine = config.cluster, config.engine
    gpus = has_gpus and config.backend.device != "cpu"
    by_node = cluster.num_processes is None or cluster.num_processes == cluster.num_nodes * cluster.devices_per_node
    per_bundle = cluster.devices_per_node if by_node else 1
    training = Bundle(cluster.cpus_per_process * per_bundle, per_bundle if gpus else 0)
    num_engines = engine.num_engines if engine.use in SERVERS and engine.address is None else 0
    devices = engine.tensor_parallel if gpus else 0
    if cluster.colocate and num_engines and devices and per_bundle % devices:
        raise ConfigError(
            f"engine.tensor_parallel is {engine.tensor_parallel}, but whet starts servers within one node, and "
            f"{per_bundle} GPUs of each train (cluster.devices_per_node); choose a divisor of it. Servers that span "
            "nodes are yours to start: give them as engine.address, without cluster.colocate"
        )
    own = Bundle(1.0, devices)
    return Plan(
        training=(training,) * (cluster.size // per_bundle),
        per_bundle=per_bundle,
        apart=cluster.num_nodes > 1,
        engines=() if cluster.colocate else (own,) * num_engines,
        colocated=num_engines if cluster.colocate else 0,
        devices_per_engine=devices,
    )


def shortage(asked: Plan, nodes: Sequence[Node]) -> str:
    """What is asked for and what there is."""
    there = "; ".join(map(str, nodes)) or "no node"
    return f"the run asks for {asked}; the cluster has {there}"


def _gpus(count: int) -> str:
    return "no GPU" if count == 0 else "1 GPU" if count == 1 else f"{count} GPUs"
