"""Rules between the settings of a cluster and those of its engines: what cannot be placed, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator

from whet.config.cluster import ClusterConfig
from whet.config.engine import EngineConfig
from whet.config.parallel_rules import SERVERS
from whet.config.problems import Problem
from whet.config.run import RunConfig

SHARES = {"vllm": "gpu_memory_utilization", "sglang": "mem_fraction_static"}
"""The option of a server that leaves a part of a GPU's memory to others."""


def cluster_problems(config: RunConfig) -> Iterator[Problem]:
    """Everything about where processes and engines run that does not go together."""
    cluster, engine = config.cluster, config.engine
    yield from _address(cluster)
    if cluster.colocate and engine.use in SERVERS:
        yield from _colocated(cluster, engine)
        option = SHARES[engine.use]
        known = {str(key).replace("-", "_") for key in engine.options}
        if config.backend.device != "cpu" and not engine.sleep and engine.address is None and option not in known:
            flag = f"--{engine.use}-{option.replace('_', '-')} 0.4"
            yield Problem(
                ("cluster", "colocate"),
                "cluster.colocate is true, but engine.sleep is false, so that engines keep all the memory of the GPUs "
                f"while the model trains; set engine.sleep, or leave them a share with {flag}",
            )


def _address(cluster: ClusterConfig) -> Iterator[Problem]:
    address = cluster.address
    if address is None or address == "auto":
        return
    told = f"cluster.address is {address!r}"
    if address.startswith(("ray://", "http://", "https://")):
        remedy = "give host:port of the cluster itself, or auto on one of its machines; from elsewhere, ray job submit"
        yield Problem(("cluster", "address"), f"{told}, the address of another service of Ray; {remedy}")
    elif not re.fullmatch(r"[^:/\s]+:\d{1,5}", address):
        text = f"{told}; give host:port, or auto for the cluster that this machine belongs to"
        yield Problem(("cluster", "address"), text)


def _colocated(cluster: ClusterConfig, engine: EngineConfig) -> Iterator[Problem]:
    if engine.address is not None:
        text = "cluster.colocate is true, but the servers of engine.address run where they are; remove one"
        yield Problem(("cluster", "colocate"), text)
        return
    asked = engine.num_engines * engine.tensor_parallel
    if asked > cluster.size:
        yield Problem(
            ("engine", "num_engines"),
            f"engine.num_engines x engine.tensor_parallel = {engine.num_engines} x {engine.tensor_parallel} = {asked}, "
            f"but with cluster.colocate engines share the {cluster.size} GPU(s) that train; lower one of them",
        )
