"""Rows with sampled completions: whose they are, and that a resumed run samples the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from whet.errors import EngineError
from whet.rollout.resampled import ResampledRows
from whet.types import Completion, Sample, Sampling, Unit


class Rows:
    """An endless walk over numbered rows: a conversation of two answers each."""

    def __init__(self) -> None:
        self.next, self.published = 0, []

    async def take(self, n: int) -> list[Unit]:
        units = []
        for i in range(self.next, self.next + n):
            units.append(Unit(f"train/{i}", (Sample([i, 1, 2, 3, 4], [False, True, False, True, True]),)))
        self.next += n
        return units

    async def publish(self, version: int) -> None:
        self.published.append(version)

    def state_dict(self) -> dict:
        return {"next": self.next}

    def load_state_dict(self, state) -> None:
        self.next = state["next"]


class Says:
    """An engine that answers with one token and the seed it was given."""

    def __init__(self, token: int, wait_s: float = 0.0) -> None:
        self.token, self.wait_s, self.asked, self.version = token, wait_s, [], 0

    async def generate(self, tokens: Sequence[int], sampling: Sampling, *, prefix_key=None) -> Completion:
        await asyncio.sleep(self.wait_s)
        self.asked.append((tuple(tokens), sampling.seed))
        return Completion([self.token, sampling.seed % 97], [-1.0, -1.0], "stop")

    async def update_weights(self, snapshot: int) -> None:
        self.version = snapshot


def source(student: Says | None, teacher: Says | None, lmbda: float, **options) -> ResampledRows:
    settings = {"seed": 3, "timeout_s": 5.0} | options
    return ResampledRows(Rows(), Sampling(), student=student, teacher=teacher, lmbda=lmbda, **settings)


async def kinds(rows: ResampledRows, steps: int) -> list[str]:
    found = []
    for _ in range(steps):
        (unit,) = await rows.take(1)
        found.append({50: "student", 60: "teacher"}.get(unit.samples[0].tokens[3], "row"))
    return found


async def test_a_sampled_completion_takes_the_place_of_the_last_answer():
    (unit,) = await source(Says(50), None, 1.0).take(1)
    assert unit.samples[0].tokens[:4] == (0, 1, 2, 50)
    assert unit.samples[0].loss_mask == (False, False, False, True, True)


async def test_lmbda_is_the_share_of_steps_on_the_students_completions():
    found = await kinds(source(Says(50), None, 0.3), 400)
    assert found.count("student") == pytest.approx(120, abs=30)
    assert set(found) == {"student", "row"}


async def test_the_teacher_writes_in_the_other_steps_where_there_is_one():
    found = await kinds(source(Says(50), Says(60), 0.5), 100)
    assert set(found) == {"student", "teacher"}
    assert set(await kinds(source(None, Says(60), 0.0), 20)) == {"teacher"}


async def test_without_engines_the_rows_are_as_they_are():
    assert set(await kinds(source(None, None, 0.0), 5)) == {"row"}


async def test_a_resumed_source_goes_on_with_the_same_rows_and_samples():
    whole = source(Says(50), Says(60), 0.5)
    expected = [await whole.take(2) for _ in range(9)]
    first = source(Says(50), Says(60), 0.5)
    for _ in range(4):
        await first.take(2)
    second = source(Says(50), Says(60), 0.5)
    second.load_state_dict(first.state_dict())
    assert [await second.take(2) for _ in range(5)] == expected[4:]


async def test_what_is_sampled_differs_by_row_and_by_step():
    student = Says(50)
    rows = source(student, None, 1.0)
    for _ in range(3):
        await rows.take(2)
        rows._rows.next = 0  # the same rows again
    assert len({seed for _, seed in student.asked}) == 6


async def test_new_weights_reach_the_student_alone():
    student, teacher = Says(50), Says(60)
    rows = source(student, teacher, 0.5)
    await rows.publish(4)
    assert (student.version, teacher.version, rows._rows.published) == (4, 0, [4])


async def test_an_engine_that_does_not_answer_is_named():
    with pytest.raises(EngineError, match=r"student has not finished 1 completions .* 0\.05 s; raise engine.timeout_s"):
        await source(Says(50, wait_s=5), None, 1.0, timeout_s=0.05).take(1)


async def test_lengths_and_cut_off_answers_are_reported():
    rows = source(Says(50), None, 1.0)
    await rows.take(3)
    assert rows.stats == {
        "rollout/on_policy": 1.0,
        "rollout/response_length_mean": 2.0,
        "rollout/truncated_ratio": 0.0,
    }
