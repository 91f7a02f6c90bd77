"""Settings of where the processes of a run are: on this machine, or on the nodes of a Ray cluster."""

from pydantic import Field

from whet.config.base import Config


class ClusterConfig(Config):
    """How many processes train, and on which machines processes and engines run."""

    num_processes: int | None = Field(default=None, ge=1)
    """Processes that train. On this machine they are started by the command, unless torchrun has started it already;
    with `address` they are spread over the nodes. `num_nodes` x `devices_per_node` when not given."""
    address: str | None = None
    """A Ray cluster to run on: `auto` for the one that this machine belongs to, or `host:port`. Without it everything
    runs on this machine, and Ray is not needed."""
    num_nodes: int = Field(default=1, ge=1)
    """Nodes that train (with `address`)."""
    devices_per_node: int = Field(default=1, ge=1)
    """Processes that train on each node, each with a GPU of its own where there are GPUs."""
    cpus_per_process: float = Field(default=1.0, gt=0)
    """CPUs that a training process reserves (with `address`)."""
    colocate: bool = False
    """Engines run on the GPUs that train, and the two hand the memory to each other."""
    max_restarts: int = Field(default=3, ge=0)
    """How often a run whose process or node is lost is begun again from its last checkpoint (with `address`)."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Most seconds until all processes have joined before the run stops and names those that are missing."""

    @property
    def size(self) -> int:
        """Processes that train."""
        return self.num_processes if self.num_processes is not None else self.num_nodes * self.devices_per_node
