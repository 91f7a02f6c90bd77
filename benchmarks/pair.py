"""Runs contestants in turns, whole processes, and compares the medians of what they report.

python -m benchmarks.pair --metric cpu_seconds --lower 'whet=python -m …' 'trl=peer/bin/python -m …'

Every process gets one thread and the same allocator settings, and its last line of output is one JSON
object (benchmarks/measure.py). The first contestant is compared with each of the others. Prints a table,
then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def take_turns(
    commands: Mapping[str, Sequence[str]], *, repeats: int, environment: Mapping[str, str] = ENVIRONMENT
) -> dict[str, list[dict]]:
    """Run each command `repeats` times, one after the other: A B A B …; the reports, by name."""
    reports: dict[str, list[dict]] = {name: [] for name in commands}
    for turn in range(repeats):
        for name, command in commands.items():
            report = run(command, environment)
            reports[name].append(report)
            print(f"  {turn + 1}/{repeats} {name}: {report['cpu_seconds']} CPU s", file=sys.stderr, flush=True)
    return reports


def run(command: Sequence[str], environment: Mapping[str, str]) -> dict:
    """One process from start to end; its report. Stops with the process's own error if it fails."""
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    try:
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        pass
    raise SystemExit(f"{shlex.join(command)}\nexited {done.returncode} without a report:\n{done.stderr[-3000:]}")


def compare(reports: Mapping[str, Sequence[Mapping]], metric: str, *, lower: bool = False) -> dict:
    """Medians of `metric`, and by which factor the first contestant is better than each of the others."""
    medians = {name: statistics.median(float(report[metric]) for report in own) for name, own in reports.items()}
    first, *others = medians
    ratios = {
        name: round(medians[name] / medians[first] if lower else medians[first] / medians[name], 3) for name in others
    }
    return {"metric": metric, "medians": medians, "ratios": ratios}


def table(title: str, comparison: Mapping, reports: Mapping[str, Sequence[Mapping]], goals: Mapping[str, float]) -> str:
    """The comparison as text: one line per contestant, with the spread of its runs."""
    metric, medians, ratios = comparison["metric"], comparison["medians"], comparison["ratios"]
    first = next(iter(medians))
    lines = [title, f"  {'':28}{metric:>26}{'lowest–highest':>20}{first + ' is better by':>24}{'goal':>8}"]
    for name, median in medians.items():
        runs = [float(report[metric]) for report in reports[name]]
        ratio = f"{ratios[name]:.2f}x" if name in ratios else ""
        goal = f"{goals[name]:.1f}x" if name in goals else ""
        lines.append(f"  {name:28}{median:>26,.1f}{f'{min(runs):,.1f}–{max(runs):,.1f}':>20}{ratio:>24}{goal:>8}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs="+", metavar="NAME=COMMAND")
    parser.add_argument("--metric", default="cpu_seconds", help="key of the reports to compare")
    parser.add_argument("--lower", action="store_true", help="less is better")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    named = dict(contestant.split("=", 1) for contestant in args.contestants)
    reports = take_turns({name: shlex.split(command) for name, command in named.items()}, repeats=args.repeats)
    comparison = compare(reports, args.metric, lower=args.lower)
    print(table(" against ".join(named), comparison, reports, {}))
    print(json.dumps(comparison))


if __name__ == "__main__":
    main()
