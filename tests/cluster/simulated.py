"""A Ray cluster of several nodes on one machine: `python simulated.py CPUS …`, the first being the head.

Says its address and the ids of its nodes, removes the nodes whose ids it reads, and ends with its input.
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster

MEMORY = 80 * 2**20


def main() -> None:
    head, *others = map(int, sys.argv[1:])
    first = {"num_cpus": head, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=first)
    try:
        nodes = [cluster.add_node(num_cpus=cpus, object_store_memory=MEMORY) for cpus in others]
        cluster.wait_for_nodes()
        print(json.dumps([cluster.address, *(node.node_id for node in nodes)]), flush=True)
        for line in sys.stdin:
            node = next(node for node in nodes if node.node_id.startswith(line.strip()))
            cluster.remove_node(node, allow_graceful=False)
            print(json.dumps("removed"), flush=True)
    finally:
        cluster.shutdown()


main()
