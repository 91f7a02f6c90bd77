"""The clock of a step: its parts add up, and what was computed is told against what the device can do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from whet import speed
from whet.speed import StepClock


@dataclass
class Computes:
    """A model that has computed so much."""

    flops: float = 100.0
    peak_flops: float | None = None


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch):
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    def set_to(seconds: float) -> None:
        now[0] = seconds

    return set_to


def test_a_step_is_told_in_its_parts(at):
    policy, reference = Computes(peak_flops=10e12), Computes()
    clock = StepClock({"policy": policy, "reference": reference, "critic": policy})
    at(3.0)
    clock.taken()
    at(5.0)
    policy.flops += 3e12
    reference.flops += 1e12
    clock.trained()
    at(5.5)
    # 4e12 in 2 s are 2e12 per second, a fifth of the peak; the policy counts once although it has two roles.
    assert clock.metrics(200) == {
        "perf/train_tokens_per_s": 100.0,
        "perf/tokens_per_s": 200 / 5.5,
        "perf/wait_ratio": 3 / 5.5,
        "perf/publish_s": 0.5,
        "perf/step_s": 5.5,
        "perf/tflops": 2.0,
        "perf/mfu": 0.2,
    }


def test_where_no_peak_is_known_no_share_of_it_is_told(at):
    model = Computes()
    clock = StepClock({"policy": model})
    model.flops += 1e12
    at(1.0)
    clock.trained()
    told = clock.metrics(1)
    assert told["perf/tflops"] == 1.0 and "perf/mfu" not in told
    assert not {"perf/tflops", "perf/mfu"} & StepClock({"policy": object()}).metrics(1).keys()  # type: ignore[dict-item]
