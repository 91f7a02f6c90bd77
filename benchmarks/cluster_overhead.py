"""What Ray costs: the same two ranks, started by our own launcher and on a simulated Ray cluster of this machine.

python -m benchmarks.cluster_overhead [--steps 40] [--repeats 2]

Prints seconds before and after the steps and seconds per step, each the least of the repeats, and how they compare.
Steps are those of SFT on a tiny model, so that whatever lies between them shows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from whet.models.tiny import make_tiny

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"backend.use": "fsdp", "backend.threads": "1", "log.tensorboard": "false", "log.progress": "false"}


def timed(work: Path, name: str, steps: int, extra: Sequence[str]) -> tuple[float, float]:
    """Seconds from the command to the end of its first step, and of each further one (the median)."""
    output = work / name
    given = {"model.path": work / "model", "data.train": work / "rows.jsonl", "data.cache_dir": work / "cache"}
    given |= {"train.steps": steps, "train.batch_size": 8, "output_dir": output, **SETTINGS}
    flags = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    began = time.time()
    subprocess.run(
        [sys.executable, "-m", "whet", "sft", *flags, *extra], env=environment, check=True, stderr=subprocess.DEVNULL
    )
    whole = time.time() - began
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    spent = [line["perf/step_s"] for line in lines if "perf/step_s" in line]
    return whole - sum(spent[1:]), statistics.median(spent[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_tiny(work / "model")
        rows = [json.dumps({"prompt": f"{i}+{i}=", "response": str(2 * i)}) for i in range(400)]
        (work / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            ways = {"launcher": ["--cluster.num_processes", "2"]}
            ways["ray"] = ["--cluster.address", cluster.address, "--cluster.num_nodes", "2"]
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for repeat in range(options.repeats):
                for name, extra in ways.items():
                    found[name].append(timed(work, f"{name}-{repeat}", options.steps, extra))
        finally:
            cluster.shutdown()
    first = {name: min(start for start, _ in each) for name, each in found.items()}
    step = {name: min(median for _, median in each) for name, each in found.items()}
    for name in found:
        print(f"{name:10} start and end {first[name]:6.1f} s, step {1000 * step[name]:7.1f} ms")
    start, each = first["ray"] - first["launcher"], step["ray"] / step["launcher"]
    print(f"ray against launcher: {start:+.1f} s at the start, a step takes {each:.2f} times as long")


if __name__ == "__main__":
    main()
