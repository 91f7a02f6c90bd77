"""Runs on a simulated Ray cluster of three nodes: their ranks and engines are spread, watched, and begun again."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs import config_of, flags_of, sums, train, write_rows
from tests.server_engines import double_python
from whet.models.tiny import make_tiny
from whet.rollout.journal import FILE, RolloutJournal

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e '.[ray]'")
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


class Nodes:
    """A head with one CPU and two nodes with two each."""

    def __init__(self) -> None:
        script = [sys.executable, str(Path(__file__).with_name("simulated.py")), "1", "2", "2"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(script, text=True, env=ENVIRONMENT, **pipes)
        self.address, *self.ids = self._hear()

    def remove(self, node: str) -> None:
        """Take a node away, as if its power failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{node}\n")
        self._process.stdin.flush()
        assert self._hear() == "removed"

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(60) == 0

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line[0] in '["':
                return json.loads(line)
        raise AssertionError("the cluster did not start")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.close()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cluster")
    rows = write_rows(folder / "rows.jsonl", sums(21))
    return {
        **{"model__path": str(make_tiny(folder / "model")), "data__train": rows},
        **{"data__cache_dir": str(folder / "cache"), "backend__threads": 1, "checkpoint__every_steps": 2},
        **{"log__tensorboard": False, "log__progress": False},
    }


class Run:
    """The command line, while it runs."""

    def __init__(self, method: str, output: Path, fault: str = "::", **settings: Any) -> None:
        flags = flags_of({"output_dir": str(output), **settings})
        self.output, self._log = output, output.with_suffix(".log")
        environment = {**ENVIRONMENT, "WHET_TEST_FAULT": fault}
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "whet", method, *flags]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def until(self, is_so: Callable[[], Any], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def ended(self, seconds: float = 150) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()

    def processes(self) -> list[str]:
        """All that runs for it, on whatever node."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                told = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.output) in told:
                found.append(told)
        return found


REPLICATED = {"backend__use": "tests.ranks.replicated:Replicated", "cluster__num_nodes": 2}


def test_an_address_where_nobody_listens_is_said_at_once(settings: dict, tmp_path: Path):
    began = time.monotonic()
    run = Run("sft", tmp_path / "run", **settings, cluster__address="127.0.0.1:9")
    assert run.ended() == 2 and "cluster.address is '127.0.0.1:9', but nothing answers there" in run.said, run.said
    assert time.monotonic() - began < 60 and not run.output.exists()


def test_what_the_cluster_has_not_is_named_after_the_limit(nodes: Nodes, settings: dict, tmp_path: Path):
    asked = {"cluster__cpus_per_process": 3, "cluster__start_timeout_s": 2}
    run = Run("sft", tmp_path / "run", **settings, cluster__address=nodes.address, **asked)
    assert run.ended() == 75, run.said
    told = r"ClusterError: the run asks for 1 x \(3 CPUs\) to train; the cluster has .*no GPU and 2 CPUs.* Waited 2 s"
    assert re.search(told, run.said), run.said


def test_a_rank_that_is_lost_again_and_again_ends_the_run(nodes: Nodes, settings: dict, tmp_path: Path):
    limits = {"cluster__max_restarts": 1, "backend__timeout_s": 20, "train__steps": 4}
    asked = {**settings, **REPLICATED, **limits, "cluster__address": nodes.address}
    run = Run("sft", tmp_path / "run", "optim_step:1:kill", **asked)
    assert run.ended() == 75, run.said
    lost = r"rank 1 \(node [\d.]+, .*, pid \d+\) was killed by SIGKILL"
    assert re.search(rf"{lost}.*; the run begins again from its last checkpoint in 2 s \(restart 1 of 1\)", run.said)
    assert re.search(rf"{lost}.*; cluster.max_restarts is 1, so that this is the end of the run", run.said), run.said


def test_a_signal_ends_the_run_in_order_and_a_kill_leaves_nobody(nodes: Nodes, settings: dict, tmp_path: Path):
    asked = {**settings, **REPLICATED, "cluster__address": nodes.address, "train__steps": 4000}
    run = Run("sft", tmp_path / "run", **asked)
    run.until(lambda: (run.output / "checkpoint-2").exists())
    assert len(run.processes()) == 3, "who started it, and two ranks"
    run.process.kill()
    deadline = time.monotonic() + 10
    while run.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert run.processes() == []
    run = Run("sft", tmp_path / "run", **asked)
    run.until(lambda: "going on from" in run.said)
    time.sleep(1.0)
    run.process.send_signal(signal.SIGINT)
    assert run.ended() == 130 and "stopping after this step" in run.said, run.said
    assert "the same command goes on from here" in run.said and run.processes() == []


def test_a_node_that_is_lost_costs_no_group(nodes: Nodes, settings: dict, tmp_path: Path):
    steps, per_step = 10, 4
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{i}+1="} for i in range(12)])
    asked = {**settings, "data__train": prompts, "reward__use": "tests.cluster.slow:brevity", "train__steps": steps}
    asked |= {"rollout__prompts_per_step": per_step, "rollout__group_size": 2, "rollout__max_tokens": 6}
    served = {"engine__use": "sglang", "engine__python": double_python(tmp_path), "cluster__address": nodes.address}
    run = Run("grpo", tmp_path / "run", **asked, **served, cluster__cpus_per_process=2)
    run.until(lambda: (run.output / "checkpoint-4").exists())
    trains, samples = (
        re.findall(rf"{who} (?:is )?on (?:node )?[\d.]+ \((\w+)\)", run.said) for who in ("rank 0", "engine 0")
    )
    assert len(trains) == len(samples) == 1 and trains != samples, run.said
    nodes.remove(trains[0])
    assert run.ended() == 0, run.said
    assert f"({trains[0]}) is gone; the run begins again from its last checkpoint" in run.said, run.said
    assert re.search(r"going on from .*checkpoint-\d", run.said) and run.processes() == []
    undisturbed = config_of("grpo", tmp_path / "undisturbed", **asked)
    train(undisturbed)
    ours, theirs = (_census(folder) for folder in (run.output, tmp_path / "undisturbed"))
    assert ours == theirs and [step for *_, step, _ in ours] == [1 + i // per_step for i in range(steps * per_step)]


def _census(folder: Path) -> list[tuple]:
    journal = RolloutJournal(folder / FILE)
    found = journal.census()
    journal.close()
    return found
