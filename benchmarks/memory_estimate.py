"""The memory estimate of `whet check` against the peak resident set of real runs: three methods, three sizes.

python -m benchmarks.memory_estimate [NAME …]

| model | parameters | vocabulary |
|---|---|---|
| small | 6M | 2,048 |
| middle | 34M | 32,000 |
| large | 125M | 151,936 |

Each run is a process of its own on the CPU, `whet sft|dpo|grpo` as a user would start it, for two steps. Its peak is
the kernel's high-water mark of the whole process. The last column is the estimate over the peak.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from whet.models.tiny import make_tiny

MIB = 2**20
SIZES = {
    "small": {"vocab_size": 2048, "hidden_size": 256, "num_layers": 6, "intermediate_size": 768},
    "middle": {"vocab_size": 32_000, "hidden_size": 448, "num_layers": 8, "intermediate_size": 1344},
    "large": {"vocab_size": 151_936, "hidden_size": 512, "num_layers": 16, "intermediate_size": 1408},
}
HEADS = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
STEPS = 2
METHODS = {
    "sft": {"train.batch_size": 4},
    "dpo": {"train.batch_size": 2},
    "grpo": {
        "rollout.prompts_per_step": 2,
        "rollout.group_size": 8,
        "rollout.max_tokens": 64,
        "reward.use": "random",
        "train.steps": STEPS,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of cases, as in sft-small; all when none is given")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("SETTING", "VALUE"), help="in every run"
    )
    names = parser.parse_args().names or [f"{method}-{size}" for size in SIZES for method in METHODS]
    extra = dict(parser.parse_args().set)
    print("| case | estimate, MiB | peak, MiB | ratio |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        for name in names:
            method, _, size = name.partition("-")
            settings = prepared(Path(folder), method, size) | extra
            guess, peak = (measured(Path(folder), what, method, settings) for what in ("estimate", "train"))
            print(f"| {name} | {guess / MIB:,.0f} | {peak / MIB:,.0f} | {guess / peak:.2f} |", flush=True)


def prepared(folder: Path, method: str, size: str) -> dict[str, object]:
    """The settings of a run, its model and data written into `folder`."""
    if not (folder / size).exists():
        make_tiny(folder / size, **SIZES[size], **HEADS)
    draw = random.Random(0)

    def text(longest: int) -> str:
        return "".join(draw.choices("abcdefgh ", k=draw.randint(longest // 2, longest)))

    rows = {
        "sft": lambda: {"prompt": text(128), "response": text(384)},
        "dpo": lambda: {"prompt": text(256), "chosen": text(256), "rejected": text(256)},
        "grpo": lambda: {"prompt": text(128), "label": "1"},
    }[method]
    data = folder / f"{method}.jsonl"
    data.write_text("".join(json.dumps(rows()) + "\n" for _ in range(8 * STEPS)), encoding="utf-8")
    return {
        "model.path": str(folder / size),
        "data.train": str(data),
        "data.cache_dir": str(folder / "cache"),
    } | METHODS[method]


def measured(folder: Path, what: str, method: str, settings: dict[str, object]) -> float:
    """Bytes: the estimate, or the peak of the run itself, by a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        common = ["--output_dir", output, "--log.progress", "false", "--eval.at_end", "false"]
        command = [sys.executable, "-m", "benchmarks.memory_estimate", "--child", what, method, *flags, *common]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def child(what: str, method: str, flags: list[str]) -> float:
    """Estimate or train in this process; returns bytes."""
    if what == "estimate":
        from whet.check.examine import examine
        from whet.config.loader import load

        found = examine(load(method, None, flags).config).memory
        assert found is not None, "there is no estimate"
        return found.peak.total
    from whet.cli import main as whet

    assert whet([method, *flags]) == 0, "the run failed"
    # Not getrusage: what that reports a child has inherited from the process that started it.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(child(sys.argv[2], sys.argv[3], sys.argv[4:]))
    else:
        main()
