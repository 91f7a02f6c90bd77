"""Whole runs of tiny models: how tests make them, read what they leave behind, and kill them at a given moment."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pkgutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from whet.compose import Run, compose
from whet.config.loader import from_values
from whet.config.run import RunConfig

# A process that has imported everything and trained nothing; each run to be killed is forked from it.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["whet.compose", "torch.utils.tensorboard"])

QUIET = {"log.progress": False, "log.tensorboard": False}


def config_of(method: str, output: Path, **settings: Any) -> RunConfig:
    """The configuration of a quiet run. Settings are written with two underscores for the dot."""
    given = {name.replace("__", "."): value for name, value in settings.items()}
    values = {**QUIET, "output_dir": str(output), "data.cache_dir": str(output.parent / "cache"), **given}
    return from_values(values, method=method, where="the test").config


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """The same settings as a command line has them."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return [text for name, value in texts.items() for text in (f"--{name.replace('__', '.')}", value)]


def train(config: RunConfig, method: Any = None) -> Run:
    """Take a run to its end, as the command line does."""
    run = compose(config, method)
    asyncio.run(run.train())
    return run


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """A JSONL file of these rows; returns its path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count: int) -> list[dict[str, str]]:
    """Worked sums, a few tokens each: `{"prompt": "3+4=", "response": "7"}`."""
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    assert count <= len(pairs)
    return [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a, b in pairs[:count]]


def metrics(folder: Path, *names: str) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`, only those that hold all `names` if any are given."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if all(name in line for name in names)]


def column(folder: Path, name: str) -> list[float]:
    """One metric over the steps that have it."""
    return [line[name] for line in metrics(folder, name)]


def without_clock(lines: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Metrics without those that depend on the machine's speed, or on what was sampled before an interruption."""
    work = ("perf/", "rollout/prefix_hit_rate")
    return [{name: value for name, value in line.items() if not name.startswith(work)} for line in lines]


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor that a model folder or checkpoint holds as weights."""
    files = [*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")]
    assert files, f"{folder} holds no weights"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets of weights have the same names, types and bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].equal(other[name]) for name in one
    )


def killed(config: RunConfig, target: str, call: int, when: str) -> int:
    """Train in a process that sends itself SIGKILL `before` or `after` a call of `target`, counted from 1.

    `target` is a dotted path, as in `whet.keeper.save_rng`. Returns the exit code, -9 if the moment came.
    """
    return in_process(_train_and_die, config, target, call, when)[0]


def in_process(function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> tuple[int, str]:
    """Exit code and standard error of a function of ours in a process of its own; the code is what it returns."""
    with tempfile.NamedTemporaryFile("r") as said:
        process = _processes.Process(target=_exit_with, args=(said.name, function, *arguments))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode is not None, f"{function.__name__} did not end within {timeout_s} s"
        return process.exitcode, said.read()


def _exit_with(said: str, function: Callable[..., Any], *arguments: Any) -> None:
    os.dup2(os.open(said, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    raise SystemExit(function(*arguments))


def _train_and_die(config: RunConfig, target: str, call: int, when: str) -> None:
    with at_call(target, call, when, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        train(config)


def at_call(target: str, call: int, when: str, act: Callable[[], Any]) -> Any:
    """A patch under which `act` happens before or after one call of `target`."""
    owner, _, name = target.rpartition(".")
    holder = pkgutil.resolve_name(owner)
    original, calls = getattr(holder, name), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            act()
        result = original(*arguments, **options)
        if calls == call and when == "after":
            act()
        return result

    return mock.patch.object(holder, name, wrapped)
