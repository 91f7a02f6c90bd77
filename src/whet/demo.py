"""`whet demo`: a model made from nothing learns to add, by supervised fine-tuning and then by its own tries.

Every sum of three digits is a problem; a fifth of them is held out and never trained on. The worked sums for
fine-tuning are sloppy, as found data is: from ten on, most forget the tens (7+8+5=0). Reinforcement learning
sees only the questions, and whether an answer was right.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.table import Table

from whet.compose import Run, compose, evaluate
from whet.config.loader import from_values
from whet.config.run import RunConfig
from whet.errors import ConfigError
from whet.log import METRICS_FILE, console
from whet.models.tiny import make_tiny
from whet.view.curves import Panel, draw_curves

NUM_HELD_OUT = 200
NUM_WORKED = 6000
SLOPPY = 0.6
"""Share of the worked sums from ten on that lack their tens."""
MARK = ".whet-demo"

MODEL = {"hidden_size": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32}
SFT = {
    "train": {"steps": 450, "batch_size": 128},
    "optim": {"lr": 2e-3, "warmup_ratio": 0.05},
    "eval": {"every_steps": 150},
}
GRPO = {
    "train": {"steps": 80},
    "optim": {"lr": 2e-4, "warmup_steps": 5, "weight_decay": 0.0, "beta2": 0.95},
    "rollout": {"prompts_per_step": 64, "group_size": 8, "max_tokens": 4},
    "engine": {"max_concurrent": 512},
    "reward": {"use": "exact"},
    "eval": {"at_start": True, "every_steps": 10, "temperature": 0.0},
}
PANELS = (
    Panel("Fine-tuning: loss", ("loss", "eval/loss"), y_label="nats per token", run="sft"),
    Panel("Reinforcement: reward", ("rollout/reward",), percent=True, run="grpo"),
    Panel("Reinforcement: held-out accuracy", ("eval/reward",), percent=True, run="grpo"),
)


@dataclass(frozen=True)
class Stage:
    """One row of the final table."""

    name: str
    accuracy: float
    seconds: float = 0.0
    tokens_per_s: float = 0.0


def main(arguments: Sequence[str]) -> int:
    """Run the demo and print what came of it. Raises ConfigError when the folder holds something else."""
    parser = argparse.ArgumentParser("whet demo", description="Watch a tiny model learn to add, from nothing.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model, the problems and the training")
    options = parser.parse_args(arguments)
    folder = _fresh(options.output_dir)
    say = console().print
    say(f"[bold]1. A model and a thousand sums from nothing[/bold], seed {options.seed}")
    write_problems(folder, options.seed)
    make_tiny(folder / "model", intermediate_size=384, max_positions=128, seed=options.seed, **MODEL)
    before, _ = asyncio.run(evaluate(grpo_config(folder, options.seed, model="model")))
    stages = [Stage("made from nothing", before["eval/reward"])]

    say(f"[bold]2. Supervised fine-tuning[/bold] on {NUM_WORKED:,} worked sums; {SLOPPY:.0%} drop the tens, if any")
    seconds, tokens, _ = _train(sft_config(folder, options.seed))
    after, _ = asyncio.run(evaluate(grpo_config(folder, options.seed, model="sft")))
    stages.append(Stage("after SFT", after["eval/reward"], seconds, tokens / seconds))

    say("[bold]3. Reinforcement learning[/bold] (GRPO) on questions alone: eight tries each, right or wrong")
    seconds, tokens, run = _train(grpo_config(folder, options.seed, model="sft"))
    stages.append(Stage("after GRPO", run.loop.progress.last_eval["eval/reward"], seconds, tokens / seconds))

    picture = draw_curves([folder / name / METRICS_FILE for name in ("sft", "grpo")], folder / "curves.png", PANELS)
    say(_table(stages))
    for episode in run.feed.transcripts:
        verdict = "right" if episode.reward == 1 else f"wrong, it is {episode.prompt.label}"
        say(f"  {episode.prompt.content}[bold]{episode.response}[/bold]   {verdict}")
    say(f"\ncurves: {picture}\nmodel:  {folder / 'grpo'}   try it: whet chat {folder / 'grpo'} --plain --temperature 0")
    return 0


def write_problems(folder: Path, seed: int) -> None:
    """`worked.jsonl`, `questions.jsonl` and `held_out.jsonl`; no sum of the last is in the other two."""
    rng = random.Random(seed)
    problems = list(product(range(10), repeat=3))
    rng.shuffle(problems)
    held_out, rest = problems[:NUM_HELD_OUT], problems[NUM_HELD_OUT:]
    worked = []
    for digits in rng.choices(rest, k=NUM_WORKED):
        row = _question(digits)
        sloppy = rng.random() < SLOPPY
        worked.append({"prompt": row["prompt"], "response": row["label"][-1] if sloppy else row["label"]})
    for name, rows in (
        ("worked", worked),
        ("questions", [_question(digits) for digits in rest]),
        ("held_out", [_question(digits) for digits in held_out]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _question(digits: tuple[int, ...]) -> dict[str, str]:
    answer = str(sum(digits))
    return {"prompt": "+".join(map(str, digits)) + "=", "response": answer, "label": answer}


def sft_config(folder: Path, seed: int) -> RunConfig:
    """The settings of the second stage."""
    data = {"train": str(folder / "worked.jsonl"), "eval": str(folder / "held_out.jsonl")}
    return _config("sft", folder, seed, "model", data, SFT)


def grpo_config(folder: Path, seed: int, *, model: str) -> RunConfig:
    """The settings of the third stage, and of the accuracy that all are measured by."""
    data = {"train": str(folder / "questions.jsonl"), "eval": str(folder / "held_out.jsonl")}
    return _config("grpo", folder, seed, model, data, GRPO)


def _config(method: str, folder: Path, seed: int, model: str, data: dict[str, str], settings: dict[str, Any]):
    common = {
        "model": {"path": str(folder / model)},
        "output_dir": str(folder / method),
        "seed": seed,
        "data": {**data, "cache_dir": str(folder / "cache")},
        "log": {"tensorboard": False},
        "backend": {"threads": 1},  # so small a model gains nothing from more, and loses much on a busy machine
    }
    return from_values({**common, **settings}, method=method, where="the demo").config


def _train(config: RunConfig) -> tuple[float, int, Run]:
    """Seconds and tokens of training, and the run."""
    started = time.perf_counter()
    run = compose(config)
    asyncio.run(run.train())
    return time.perf_counter() - started, run.loop.progress.num_tokens, run


def _fresh(folder: Path) -> Path:
    """An empty folder; an earlier demo's is emptied, anything else is left alone."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            raise ConfigError(f"{folder} holds files that no demo left there; give another folder with --output-dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    return folder


def _table(stages: Sequence[Stage]) -> Table:
    table = Table(title=f"Accuracy on {NUM_HELD_OUT} held-out sums, greedy")
    for name in ("", "accuracy", "seconds", "tokens/s"):
        table.add_column(name, justify="left" if not name else "right")
    for stage in stages:
        timing = (f"{stage.seconds:.0f}", f"{stage.tokens_per_s:,.0f}") if stage.seconds else ("", "")
        table.add_row(stage.name, f"{stage.accuracy:.1%}", *timing)
    return table
