"""What `whet plan` predicts of memory against the peak resident set of real runs on this machine's CPU.

python -m benchmarks.plan_against_measured [NAME …] [--set SETTING VALUE …]

Cases are those of `benchmarks.memory_estimate`: `sft`, `dpo` and `grpo` with models of 6M, 34M and 125M parameters.
With `--set backend.use fsdp --set cluster.num_processes 2` each run has two processes; the larger one is compared. A
process and its children are looked at ten times a second, by the kernel's high-water mark of each. The plan knows the
lengths of the data, as in `whet check --plan`; the last column is the prediction over the peak.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.memory_estimate import METHODS, SIZES, prepared

MIB = 2**20
POLL_S = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of cases, as in sft-small; all when none is given")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("SETTING", "VALUE"), help="in all runs")
    options = parser.parse_args()
    names = options.names or [f"{method}-{size}" for size in SIZES for method in METHODS]
    print("| case | predicted, MiB | measured, MiB | ratio |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        for name in names:
            method, _, size = name.partition("-")
            settings = prepared(Path(folder), method, size) | dict(options.set)
            flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
            flags += ["--log.progress", "false", "--eval.at_end", "false"]
            guess, peak = predicted(method, flags), peak_of([method, *flags, "--output_dir", f"{folder}/{name}"])
            print(f"| {name} | {guess / MIB:,.0f} | {peak / MIB:,.0f} | {guess / peak:.2f} |", flush=True)


def predicted(method: str, flags: list[str]) -> float:
    """Bytes of the fullest process, by the plan."""
    from whet.check.examine import examine
    from whet.config.loader import load
    from whet.plan.choose import Planned
    from whet.plan.load import measured

    config = load(method, None, flags).config
    return Planned(config, None, measured(examine(config))).configured.training.peak.total


def peak_of(arguments: list[str]) -> float:
    """Bytes: the largest high-water mark of a command's processes."""
    command = [sys.executable, "-m", "whet", *arguments]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0.0
    while running.poll() is None:
        most = max([most, *map(_high_water, _family(running.pid))])
        time.sleep(POLL_S)
    assert running.returncode == 0, f"{' '.join(command)} ended with {running.returncode}"
    return most


def _family(pid: int) -> list[int]:
    """A process and all that came of it."""
    found, waiting = [], [pid]
    while waiting:
        found.append(one := waiting.pop())
        children = Path(f"/proc/{one}/task/{one}/children")
        try:
            waiting += map(int, children.read_text(encoding="ascii").split())
        except OSError:  # it has ended
            continue
    return found


def _high_water(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("VmHWM:")), 0.0)


if __name__ == "__main__":
    main()
