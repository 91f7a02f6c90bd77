"""What becomes of a run when its processes end, and what it asks of a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import config_of
from whet.cluster.placement import Bundle, Node, plan, shortage
from whet.cluster.recovery import Outcome, supervise
from whet.config.run import RunConfig
from whet.errors import ConfigError


def outcomes(*found: Outcome):
    """An attempt that ends like this, one after the other, and the pauses between them."""
    left, pauses = list(found), list[float]()
    return lambda restarts: left.pop(0), pauses, left


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome({0: 0, 1: 0}), 0),
        (Outcome({0: 0, 1: -6}, ["rank 1 was killed by SIGABRT"]), 0),  # the run was complete
        (Outcome({0: 2, 1: 0}), 2),
        (Outcome({0: 75, 1: 2}), 2),  # what rank 1 could not load, a user can mend
        (Outcome({0: 130, 1: 0}), 130),
        (Outcome({0: 0}, interrupted=True), 0),
        (Outcome({1: 0}, ["rank 0 is lost"], interrupted=True), 130),
    ],
)
def test_what_another_attempt_would_not_mend_is_not_begun_again(outcome: Outcome, code: int):
    attempt, pauses, _ = outcomes(outcome)
    assert supervise(attempt, 3, pauses.append) == code and pauses == []


@pytest.mark.parametrize(
    "lost",
    [
        Outcome({0: 75, 1: -9}, ["rank 1 was killed by SIGKILL"]),
        Outcome({1: 75}, ["rank 0 is lost: node 10.0.0.7 is gone"]),
        Outcome({0: 75, 1: 75}),
        Outcome({0: 1, 1: 0}, ["rank 0 ended with exit code 1"]),
        Outcome({}, ["process 1 of 2 was lost when asked to start"]),
    ],
)
def test_a_run_that_loses_a_process_is_begun_again(lost: Outcome):
    attempt, pauses, left = outcomes(lost, lost, Outcome({0: 0}))
    assert supervise(attempt, 3, pauses.append) == 0 and pauses == [2.0, 4.0] and not left


def test_restarts_are_counted_and_waits_grow_to_a_limit(caplog: pytest.LogCaptureFixture):
    lost = Outcome({1: -9}, ["rank 1 was killed by SIGKILL"])
    attempt, pauses, left = outcomes(*[lost] * 8)
    assert supervise(attempt, 7, pauses.append) == 75 and not left
    assert pauses == [2, 4, 8, 16, 32, 60, 60]
    assert "rank 1 was killed by SIGKILL; cluster.max_restarts is 7, so that this is the end" in caplog.text
    assert supervise(outcomes(Outcome({0: 1}))[0], 0) == 1, "the code of rank 0 where it has one"
    assert supervise(outcomes(Outcome({0: -9}))[0], 0) == 75, "unless a signal ended it"


def made(tmp_path: Path, **settings) -> RunConfig:
    given = {"model__path": "m", "data__train": "rows.jsonl", "reward__use": "math", "cluster__address": "auto"}
    return config_of("grpo", tmp_path / "out", **given, **settings)


def test_each_training_node_is_one_bundle_and_each_engine_another(tmp_path: Path):
    servers = {"engine__use": "vllm", "engine__num_engines": 2, "engine__tensor_parallel": 2, "backend__use": "fsdp"}
    nodes = {"cluster__num_nodes": 2, "cluster__devices_per_node": 4, "cluster__cpus_per_process": 3}
    apart = plan(made(tmp_path, **servers, **nodes), has_gpus=True)
    assert apart.training == (Bundle(12, 4),) * 2 and apart.per_bundle == 4 and apart.apart and apart.size == 8
    assert apart.engines == (Bundle(1, 2),) * 2 and apart.colocated == 0
    without = plan(made(tmp_path, **servers, **nodes), has_gpus=False)
    assert without.training == (Bundle(12),) * 2 and without.engines == (Bundle(1),) * 2
    kept_off = plan(made(tmp_path, **servers, **nodes, backend__device="cpu"), has_gpus=True)
    assert kept_off.training == without.training and kept_off.devices_per_engine == 0
    together = plan(made(tmp_path, **servers, **nodes, cluster__colocate=True, engine__sleep=True), has_gpus=True)
    assert together.engines == () and together.colocated == 2 and together.training == apart.training
    spanning = {**servers, "engine__num_engines": 1, "engine__tensor_parallel": 8}
    with pytest.raises(ConfigError, match=r"tensor_parallel is 8, but whet starts servers within one node, and 4 GPUs"):
        plan(made(tmp_path, **spanning, **nodes, cluster__colocate=True, engine__sleep=True), has_gpus=True)


def test_processes_without_nodes_are_spread_one_by_one(tmp_path: Path):
    found = plan(made(tmp_path, cluster__num_processes=3, backend__use="fsdp"), has_gpus=True)
    assert found.training == (Bundle(1, 1),) * 3 and not found.apart and found.engines == ()
    external = {"engine__use": "vllm", "engine__address": "http://10.0.0.9:8000"}
    assert plan(made(tmp_path, **external), has_gpus=True).engines == (), "servers that run already need no room"


def test_a_shortage_names_what_is_asked_and_what_there_is(tmp_path: Path):
    asked = plan(made(tmp_path, cluster__num_nodes=2, backend__use="fsdp", engine__use="vllm"), has_gpus=True)
    told = shortage(asked, [Node("abcdef0123", "10.0.0.7", {"CPU": 8.0, "GPU": 1.0})])
    assert told == (
        "the run asks for 2 x (1 GPU and 1 CPU) to train, each on a node of its own, and 1 x (1 GPU and 1 CPU) for "
        "engines; the cluster has 10.0.0.7 (abcdef01) with 1 GPU and 8 CPUs"
    )
