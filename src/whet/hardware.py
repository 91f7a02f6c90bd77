"""GPUs as their makers describe them: memory, arithmetic, bandwidth and links."""

from __future__ import annotations

import re
from dataclasses import dataclass

from whet.errors import ConfigError

GIB = 2**30
NETWORK = 50e9
"""Bytes per second and GPU between nodes: one 400 Gbit/s adapter for each, as in the usual machines with eight."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. `memory` in bytes is what a program is given of it, rates are peaks per second.

    `half`, `tf32` and `single` are dense FLOP/s in 16 bits, in TensorFloat-32 (or what takes its place) and in
    float32; `bandwidth` is of its memory, and `link` that to the other GPUs of its node, in one direction.
    """

    name: str
    pattern: str
    memory: float
    half: float
    tf32: float
    single: float
    bandwidth: float
    link: float


def _gpu(name: str, pattern: str, gib: float, flops: tuple[float, float, float], bandwidth: float, link: float) -> Gpu:
    half, tf32, single = (rate * 1e12 for rate in flops)
    return Gpu(name, pattern, gib * GIB, half, tf32, single, bandwidth * 1e12, link * 1e9)


HOPPER = (989, 494, 67)
GPUS = [
    _gpu("GB200-186G", r"GB200", 184.0, (2250, 1100, 80), 8.0, 900),
    _gpu("B200-180G", r"B200", 178.4, (2250, 1100, 80), 8.0, 900),
    _gpu("H100-PCIe-80G", r"H100 PCIe", 79.6, (756, 378, 51), 2.0, 64),
    _gpu("H100-NVL-94G", r"H100 NVL", 93.6, (835, 418, 60), 3.9, 300),
    _gpu("GH200-96G", r"GH200", 95.6, HOPPER, 4.0, 450),
    _gpu("H200-141G", r"H200", 139.8, HOPPER, 4.8, 450),
    _gpu("H100-80G", r"H100", 79.6, HOPPER, 3.35, 450),
    _gpu("H20-96G", r"H20\b", 95.6, (148, 74, 44), 4.0, 450),
    _gpu("A100-40G", r"A100.*40G", 39.4, (312, 156, 19.5), 1.555, 300),
    _gpu("A100-80G", r"A100", 79.3, (312, 156, 19.5), 2.039, 300),
    _gpu("A800-80G", r"A800", 79.3, (312, 156, 19.5), 2.039, 200),
    _gpu("L40S-48G", r"L40S", 44.5, (362, 183, 91.6), 0.864, 32),
    _gpu("L40-48G", r"L40\b", 44.5, (181, 90.5, 90.5), 0.864, 32),
    _gpu("L4-24G", r"\bL4\b", 22.0, (121, 60, 30.3), 0.3, 32),
    _gpu("A10G-24G", r"A10G", 22.0, (70, 35, 35), 0.6, 32),
    _gpu("A10-24G", r"\bA10\b", 22.0, (125, 62.5, 31.2), 0.6, 32),
    _gpu("A6000-48G", r"A6000", 47.5, (155, 77.4, 38.7), 0.768, 32),
    _gpu("5090-32G", r"RTX 5090", 31.4, (209, 105, 105), 1.792, 64),
    _gpu("4090-24G", r"RTX 4090", 23.5, (165, 82.6, 82.6), 1.008, 32),
    _gpu("3090-24G", r"RTX 3090", 23.5, (71, 35.6, 35.6), 0.936, 32),
    _gpu("V100-32G", r"V100", 31.7, (125, 15.7, 15.7), 0.9, 150),
    _gpu("T4-16G", r"\bT4\b", 14.6, (65, 8.1, 8.1), 0.32, 16),
    _gpu("MI300X-192G", r"MI300X", 191.5, (1307, 653, 163), 5.3, 448),
    _gpu("MI250-128G", r"MI250", 127.5, (383, 96, 96), 3.2, 300),
]
"""In the order in which a device's name is looked for: the first whose pattern fits counts."""


@dataclass(frozen=True)
class Machines:
    """`nodes` machines with `per_node` GPUs of one kind each."""

    gpu: Gpu
    per_node: int
    nodes: int = 1

    @property
    def devices(self) -> int:
        return self.per_node * self.nodes

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        return f"{nodes}{self.per_node}x{self.gpu.name}"


def gpu_named(device_name: str) -> Gpu | None:
    """The kind of a GPU by the name that its driver gives it; None where that is not known."""
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, device_name)), None)


def read_machines(text: str, nodes: int = 1) -> Machines:
    """What `8xH100-80G` or `H200` says. Raises ConfigError for what is not in GPUS."""
    count, times, name = text.strip().partition("x")
    if not (times and count.isdigit() and int(count)):
        count, name = "1", text.strip()
    found = [gpu for gpu in GPUS if gpu.name.lower() == name.lower()]
    found = found or [gpu for gpu in GPUS if gpu.name.lower().startswith(f"{name.lower()}-")]
    if not found:
        known = ", ".join(gpu.name for gpu in GPUS)
        raise ConfigError(f"--gpus is {text!r}, expected a number and a kind, as in 8xH100-80G; known are {known}")
    if len(found) > 1:
        raise ConfigError(f"--gpus is {text!r}, which may be {' or '.join(gpu.name for gpu in found)}; write which")
    return Machines(found[0], int(count), nodes)
