"""What every contestant measures of itself, and the JSON line it ends with. Standard library only.

Seconds and CPU seconds (user and system, all threads) run from the end of the last warm-up step to the
end of the last step: collation, forward, backward, optimizer and logging, and for reinforcement learning
generation and reward; no imports, no loading, no tokenising up front.

Peak memory is the highest resident set while training, warm-up included, minus the resident set when
training begins (weights loaded, data tokenised, freed memory returned). So it holds gradients, optimizer
state, activations and logits. The kernel's high-water mark is reset when training begins: Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MIB = 2**20


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all contestants share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a transformers model")
    parser.add_argument("--data", required=True, help="JSONL file")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="of the forward pass")
    parser.add_argument("--matmul", choices=["highest", "high", "medium"], default="highest", help="float32 products")
    return parser


class Measure:
    """Clock and scales of one contestant: `begin`, then `step_end` after each step, then `report`."""

    def __init__(self, *, warmup: int, steps: int) -> None:
        self.warmup = warmup
        self.steps = steps
        self.losses: list[float] = []
        self._done = 0
        self._counts: dict[str, int] = {}
        self._sampling = 0.0

    @property
    def _timed(self) -> bool:
        return self.warmup <= self._done < self.warmup + self.steps

    def begin(self) -> None:
        """Training is about to start: what is resident now, freed memory returned, does not count."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if self.warmup == 0:
            self._start = time.perf_counter(), time.process_time()

    def step_end(self) -> None:
        """One step is done."""
        self._done += 1
        now = time.perf_counter(), time.process_time()
        if self._done == self.warmup:
            self._start = now
        if self._done == self.warmup + self.steps:
            self._end = now

    def count(self, **amounts: int) -> None:
        """Add to named counts of work, unless this step belongs to the warm-up."""
        if self._timed:
            for name, amount in amounts.items():
                self._counts[name] = self._counts.get(name, 0) + int(amount)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """CPU time spent in here is the sampling's share, reported beside the whole."""
        start = time.process_time()
        yield
        if self._timed:
            self._sampling += time.process_time() - start

    def report(self, name: str, **extra: object) -> None:
        """Print the one JSON line that the harness reads."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds, cpu_seconds = (end - start for end, start in zip(self._end, self._start, strict=True))
        rates = {f"{count}_per_cpu_s": round(amount / cpu_seconds, 1) for count, amount in self._counts.items()}
        line = {
            "name": name,
            "steps": self.steps,
            "seconds": round(seconds, 3),
            "cpu_seconds": round(cpu_seconds, 3),
            "sampling_cpu_seconds": round(self._sampling, 3),
            **self._counts,
            **rates,
            "peak_mb": round((peak - self._resident) / MIB, 1),
            "resident_before_mb": round(self._resident / MIB, 1),
            "losses": [round(loss, 5) for loss in self.losses],
            "versions": _versions("torch", "transformers", "trl", "whet"),
            **extra,
        }
        print(json.dumps(line), flush=True)


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
