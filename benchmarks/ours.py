"""What the scripts that drive whet share: settings, and where the measure hooks in."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from typing import Any

from benchmarks.measure import Measure
from whet.compose import compose
from whet.config.run import RunConfig


def configuration(args: argparse.Namespace, **sections: Any) -> RunConfig:
    """As many steps as asked, on the CPU, AdamW without decay, nothing evaluated or saved.

    With `--own-defaults` the precision of matrix products is whet's own choice.
    """
    return RunConfig.model_validate(
        {
            "output_dir": tempfile.mkdtemp(prefix="bench-"),
            "model": {"path": args.model},
            "optim": {"lr": args.lr, "schedule": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0},
            "backend": {
                "device": "cpu",
                "precision": args.precision,
                "matmul": "auto" if args.own_defaults else args.matmul,
            },
            "checkpoint": {"resume": False},
            "eval": {"at_end": False},
            "log": {"tensorboard": False, "progress": False},
            **sections,
        }
    )


def train(config: RunConfig, args: argparse.Namespace, name: str, *, source: Any = None) -> None:
    """Compose, train with the clock running, report. `source` takes the place of the run's own."""
    measure = Measure(warmup=args.warmup, steps=args.steps)
    run = compose(config)
    if source is not None:
        run.loop.source = source
    take = run.loop.source.take

    async def counted(n: int) -> list:
        with measure.sampling():
            units = await take(n)
        samples = [sample for unit in units for sample in unit.samples]
        trained = sum(sum(sample.loss_mask) for sample in samples)
        measure.count(tokens=sum(len(sample.tokens) for sample in samples), completion_tokens=trained)
        return units

    run.loop.source.take = counted
    run.loop.callbacks.append(lambda _: measure.step_end())
    measure.begin()
    asyncio.run(run.train())
    key = "train/loss" if config.method == "grpo" else "loss"
    records = map(json.loads, run.loop.log.path.read_text(encoding="utf-8").splitlines())
    measure.losses = [record[key] for record in records if key in record]
    chosen = run.policy.backend.describe()
    measure.report(name, **{item: chosen[item] for item in ("precision", "matmul", "attention")})
