"""Does each algorithm learn? A tiny model made from nothing, a stated reward, three seeds, minutes on a CPU.

python -m benchmarks.learns [METHOD …] [--seeds 3] [--steps 40] [--output FOLDER]

The prompt is one of six letters, the answer four bytes, the reward the share of bytes that are that letter. Before it
comes a supervised warm-up on answers of these letters, the right one three times as likely as each other. `opd`
has no reward: its teacher was taught the right answers. Prints the reward of the first and of the last three steps by
run and seed, and ends with 1 unless every run has risen by RISE.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from whet.compose import compose
from whet.config.algorithm_rules import REINFORCES
from whet.config.loader import from_values
from whet.models.tiny import make_tiny
from whet.types import Episode

LETTERS = "abcdef"
RISE = 0.2
QUIET = {"log.progress": False, "log.tensorboard": False, "checkpoint.resume": False}
COMMON = {
    **{"optim.lr": 1e-3, "optim.schedule": "constant", "optim.weight_decay": 0.0},
    **{"rollout.max_tokens": 4, "rollout.optimizer_steps": 2},
}
GROUPS = {"rollout.prompts_per_step": 12, "rollout.group_size": 8}
SINGLES = {"rollout.prompts_per_step": 96, "rollout.group_size": 1}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("reinforce++", "remax", "ppo"), SINGLES),
    "opd": {"shaping.whiten": True},
    "dapo": {"rollout.max_tokens": 6},  # or every answer would be too long
    "ppo (shared critic)": {**SINGLES, "critic.shared": True},
    "grpo (kl in the loss)": {"kl.coef": 0.01},
    "grpo (kl in the reward)": {"kl.coef": 0.01, "kl.where": "reward"},
    "grpo (tis, rows beside it)": {"correction": "tis", "mix.coef": 0.05, "mix.batch_size": 8},
    "grpo (maxrl)": {"credit": "maxrl"},
}
"""Settings of a run beside those that all have; a name says the method before its first space."""
RUNS = (*REINFORCES, *(name for name in OWN if " " in name))


def share(episode: Episode) -> float:
    """How much of the response is the letter of the prompt."""
    return episode.response.count(str(episode.prompt.content)[0]) / episode.num_sampled


def main() -> int:
    """Train all runs with all seeds, print the table. Returns 1 where one has not learned."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", metavar="METHOD", help=f"among {', '.join(RUNS)}; all when not given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", help="folder for the runs; a temporary one when not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(options.output or tempfile.mkdtemp())
    prepare(folder)
    wanted = [run for run in RUNS if not options.runs or run in options.runs or run.split()[0] in options.runs]
    print(f"{'run':36}" + "".join(f"{f'seed {seed}':>16}" for seed in range(options.seeds)) + f"{'seconds':>10}")
    good = True
    for run in wanted:
        started, cells = time.perf_counter(), []
        for seed in range(options.seeds):
            start, end = trained(run, seed, folder, options.steps)
            good &= end - start >= RISE
            cells.append(f"{f'{start:.2f} -> {end:.2f}':>16}")
        print(f"{run:36}{''.join(cells)}{(time.perf_counter() - started) / options.seeds:10.1f}", flush=True)
    print("every run has learned" if good else f"NOT every run has risen by {RISE}")
    return 0 if good else 1


def prepare(folder: Path) -> None:
    """Prompts, rows, a model that writes any of the letters, and one that writes the right one."""
    draw = random.Random(0)
    write(folder / "prompts.jsonl", [{"prompt": f"{letter}:"} for letter in LETTERS])
    anything = [(c, "".join(draw.choices(LETTERS + 2 * c, k=4))) for c in LETTERS for _ in range(40)]
    write(folder / "any.jsonl", [{"prompt": f"{c}:", "response": text} for c, text in anything])
    write(folder / "right.jsonl", [{"prompt": f"{c}:", "response": 4 * c} for c in LETTERS])
    make_tiny(folder / "nothing")
    for name, start, rows, steps in (("model", "nothing", "any", 400), ("teacher", "model", "right", 100)):
        train("sft", folder, name, 0, {"model.path": folder / start, "data.train": folder / f"{rows}.jsonl"}, steps)


def trained(run: str, seed: int, folder: Path, steps: int) -> tuple[float, float]:
    """The mean reward of the first and of the last three steps of a run."""
    method = run.split()[0]
    settings = {**COMMON, **GROUPS, **OWN.get(run, {}), "reward": "benchmarks.learns:share"}
    settings |= {"model.path": folder / "model", "data.train": folder / "prompts.jsonl"}
    if method == "opd":
        settings["distill.teacher"] = folder / "teacher"
    if "mix.coef" in settings:
        settings["mix.data"] = folder / "any.jsonl"
    output = train(method, folder, f"{run}-{seed}".replace(" ", "-"), seed, settings, steps)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = [line["rollout/reward"] for line in lines if "rollout/reward" in line]
    assert len(rewards) == steps, f"{run} has {len(rewards)} steps"
    return statistics.fmean(rewards[:3]), statistics.fmean(rewards[-3:])


def train(method: str, folder: Path, name: str, seed: int, settings: dict[str, Any], steps: int) -> Path:
    """One run; returns its folder."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    own = {"output_dir": str(folder / name), "data.cache_dir": str(folder / "cache"), "train.steps": steps}
    defaults = {"optim.lr": 3e-3, "train.batch_size": 24} if method == "sft" else {}
    values = {**QUIET, **defaults, **plain, **own, "seed": seed, "data.chat": "never"}
    asyncio.run(compose(from_values(values, method=method, where="the benchmark").config).train())
    return folder / name


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
