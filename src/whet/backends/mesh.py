"""The processes of a run as meshes: over which of them weights are sharded, and which share a stream of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from whet.backends.slices import Slices
from whet.ranks.layout import Layout


@dataclass(frozen=True)
class Meshes:
    """`shards`: ranks over which weights are divided, those that see other tokens; `tensor`: ranks that divide
    matrices; `experts` and `replicas`: `shards` once more, as those that divide the experts of a layer and those that
    divide one expert's weights. All are parts of one mesh, so that a weight can be divided in two ways.
    """

    layout: Layout
    shards: DeviceMesh
    tensor: DeviceMesh
    experts: DeviceMesh
    replicas: DeviceMesh
    slices: Slices


def make_meshes(layout: Layout, device_type: str, timeout_s: float) -> Meshes:
    """Meshes over all ranks of the run, every group of processes with this limit on what it does together."""
    seen = layout.data * layout.context
    whole = init_device_mesh(
        device_type,
        (seen // layout.expert, layout.expert, layout.tensor),
        mesh_dim_names=("replicas", "experts", "tensor"),
    )
    places = init_device_mesh(
        device_type, (layout.data, layout.context, layout.tensor), mesh_dim_names=("data", "context", "tensor")
    )
    shards = whole["replicas", "experts"]._flatten("shards")
    sharing = places["context", "tensor"]._flatten("sharing")
    parts = (shards, sharing, *(whole[name] for name in ("tensor", "experts", "replicas")), places["context"])
    for mesh in (*parts, places["tensor"]):
        _set_pg_timeout(timedelta(seconds=timeout_s), mesh.get_group())
    slices = Slices(places["context"].get_group(), places["tensor"].get_group(), sharing.get_group())
    return Meshes(layout, shards, whole["tensor"], whole["experts"], whole["replicas"], slices)
