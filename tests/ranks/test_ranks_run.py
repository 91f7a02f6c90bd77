"""Runs over two processes: the same numbers as one, and an error that names whoever is lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import flags_of, sums, write_rows
from whet.errors import ClusterError
from whet.models.tiny import make_tiny
from whet.ranks.environment import size_in_environment

ROOT = Path(__file__).resolve().parents[2]
SPREAD = {"backend__use": "tests.ranks.replicated:Replicated", "cluster__num_processes": 2}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("spread")
    model = make_tiny(folder / "model")
    rows = write_rows(folder / "rows.jsonl", sums(21))
    return {
        **{"model__path": str(model), "data__train": rows, "data__cache_dir": str(folder / "cache")},
        **{"log__tensorboard": False, "log__progress": False, "backend__threads": 1},
    }


def run(method: str, output: Path, fault: str = "", alone: dict[str, str] | None = None, **settings) -> tuple[int, str]:
    """The command line with these settings; its exit code and all that it says."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "WHET_TEST_FAULT": fault or "::"}
    environment |= alone or {}
    flags = flags_of({"output_dir": str(output), **settings})
    done = subprocess.run(
        [sys.executable, "-m", "whet", method, *flags], env=environment, capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout + done.stderr


def numbers(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "grad_norm", "eval/loss", "train/loss", "train/grad_norm", "train/kl", "rollout/reward_mean")
    return [{name: line[name] for name in kept if name in line} for line in lines]


def test_two_processes_train_what_one_does_and_go_on_where_they_stopped(settings: dict, tmp_path: Path):
    offline = {**settings, "data__eval": settings["data__train"], "train__batch_size": 5, "eval__every_steps": 2}
    offline |= {"optim__schedule": "constant"}
    assert run("sft", tmp_path / "one", **offline, train__steps=4)[0] == 0
    code, said = run("sft", tmp_path / "two", **offline, **SPREAD, train__steps=2, checkpoint__every_steps=2)
    assert code == 0 and "processes 2, layout data 2" in said, said
    code, said = run("sft", tmp_path / "two", **offline, **SPREAD, train__steps=4, checkpoint__every_steps=2)
    assert code == 0 and "going on from" in said, said
    ours, theirs = numbers(tmp_path / "two"), numbers(tmp_path / "one")
    assert len(ours) == len(theirs) == 6
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, abs=1e-5)


def test_one_process_goes_on_where_several_stopped_and_not_the_other_way(settings: dict, tmp_path: Path):
    asked = {**settings, "optim__schedule": "constant", "checkpoint__every_steps": 2, "train__batch_size": 5}
    spread = {"backend__use": "fsdp", "cluster__num_processes": 2}
    assert run("sft", tmp_path / "one", **asked, train__steps=4)[0] == 0
    assert run("sft", tmp_path / "two", **asked, **spread, train__steps=2)[0] == 0
    code, said = run("sft", tmp_path / "two", **asked, train__steps=4)
    assert code == 0 and "going on from" in said, said
    for own, other in zip(numbers(tmp_path / "two"), numbers(tmp_path / "one"), strict=True):
        assert own == pytest.approx(other, abs=1e-5)
    code, said = run("sft", tmp_path / "one", **asked, **spread, train__steps=6)
    assert code == 2 and "was written by the backend local" in said and "backend.use: local" in said, said


def test_reinforcement_samples_from_a_copy_that_follows(settings: dict, tmp_path: Path):
    asked = {**settings, "reward__use": "tests.ranks.short:brevity", "rollout__prompts_per_step": 3}
    asked |= {"rollout__group_size": 2, "rollout__max_tokens": 6, "train__steps": 3, "kl__coef": 0.1}
    del asked["data__train"]
    asked["data__train"] = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{i}+1="} for i in range(9)])
    assert run("grpo", tmp_path / "one", **asked)[0] == 0
    code, said = run("grpo", tmp_path / "two", **asked, **SPREAD)
    assert code == 0 and "samples from a copy of the weights" in said, said
    for own, other in zip(numbers(tmp_path / "two"), numbers(tmp_path / "one"), strict=True):
        assert own == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("optim_step:1:kill", "rank 1 .*is dead or stopped"),
        ("forward_backward:1:raise", "rank 1 .*failed: .*the disk of this rank is on fire"),
        ("optim_step:1:stop", "rank 1 .*is dead or stopped"),
        ("optim_step:1:sleep", "all processes are alive; rank 1 .*is at replicated.py:\\d+ _fault"),
    ],
)
def test_a_rank_that_is_lost_ends_the_run_and_is_named(fault: str, told: str, settings: dict, tmp_path: Path):
    code, said = run("sft", tmp_path / "run", fault, **settings, **SPREAD, backend__timeout_s=4, train__steps=2)
    assert code == 75, said
    assert re.search(rf"ClusterError: .* of the policy failed: {told}", said, re.DOTALL), said


def test_without_the_leader_nobody_stays(settings: dict, tmp_path: Path):
    code, said = run("sft", tmp_path / "run", "optim_step:0:kill", **settings, **SPREAD, train__steps=2)
    assert code == 137 and "rank 0" in said and "was killed by SIGKILL" in said


def test_what_is_wrong_is_told_once(settings: dict, tmp_path: Path):
    asked = {**settings, "data__train": str(tmp_path / "nowhere.jsonl")}
    code, said = run("sft", tmp_path / "run", **asked, **SPREAD)
    assert code == 2 and said.count("DataError") == 1 and "rank 1" not in said, said


def test_whoever_does_not_come_is_named(settings: dict, tmp_path: Path):
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29873"}
    del (asked := {**settings, **SPREAD})["cluster__num_processes"]
    code, said = run("sft", tmp_path / "run", alone=alone, **asked, cluster__start_timeout_s=3)
    assert code == 75 and "waited 3 s for all 2 processes" in said and "rank 1 did not come" in said, said


def test_half_an_environment_is_refused():
    assert size_in_environment({}) is None
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert size_in_environment(whole) == 2
    with pytest.raises(ClusterError, match="MASTER_PORT but not RANK"):
        size_in_environment({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
