"""What the scripts that drive TRL share: its arguments, and a callback that measures."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.measure import Measure


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Model, tokenizer and the arguments that every trainer of TRL takes.

    TRL's own defaults of precision (bf16) and activation checkpointing (on) are set to what the
    comparison asks for.
    """
    torch.set_float32_matmul_precision(args.matmul)
    transformers.logging.set_verbosity_error()
    return {
        "model": AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa"),
        "processing_class": AutoTokenizer.from_pretrained(args.model),
    }


def training_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of TRL's configurations: as many steps as asked, AdamW, no decay, nothing saved."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="bench-"),
        "max_steps": args.warmup + args.steps,
        "learning_rate": args.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "bf16": args.precision == "bf16",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def read_rows(path: str, *columns: str) -> Dataset:
    """A JSONL file, the named columns only."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{column: row[column] for column in columns} for row in rows])


class MeasureCallback(TrainerCallback):
    """Tells the measure where training begins, where steps end, and the losses."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.measure.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.measure.step_end()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.measure.losses.append(float(logs["loss"]))
