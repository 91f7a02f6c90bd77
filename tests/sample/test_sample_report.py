"""The report adds up: by hand, and over any groups."""

from __future__ import annotations

import json

import pytest

from whet.config.sample import SampleConfig
from whet.sample.journal import Completed
from whet.sample.report import Tally, in_lines
from whet.sample.select import select


def report_of(groups: list[list[Completed]], **settings) -> dict:
    tally = Tally(SampleConfig(**settings))
    for group in groups:
        tally.add(group, select(group, tally.config))
    return tally.report()


GROUPS = [
    [
        Completed(0, "a", 1.0, "completed", 2, {"math": 1.0, "brief": 0.0}),
        Completed(1, "b", 0.0, "truncated", 4, {"math": 0.0, "brief": 0.0}),
    ],
    [
        Completed(0, "c", 0.5, "completed", 6, {"math": 0.0, "brief": 0.5}),
        Completed(1, "", None, "failed", 0, error="x"),
    ],
]


def test_the_numbers_are_those_worked_by_hand():
    report = report_of(GROUPS)
    assert (report["prompts"], report["completions"], report["scored"], report["failed"]) == (2, 4, 3, 1)
    assert report["pass_rate"] == pytest.approx(1 / 3)  # one of three scored reaches 1
    assert report["solved"] == 0.5
    assert report["score"]["mean"] == pytest.approx(0.5) and report["score"]["max"] == 1.0
    assert report["best_score_mean"] == pytest.approx(0.75)  # (1 + 0.5) / 2
    assert report["rewards"] == {"brief": pytest.approx(0.5 / 3), "math": pytest.approx(1 / 3)}
    assert (report["truncated"], report["tokens_mean"]) == (0.25, 3.0)
    assert (report["rows"], report["prompts_with_rows"], report["kept"]) == (2, 2, 2)
    assert report["dropped"] == {"failed": 1, "truncated": 1}
    assert report["failures"] == {"x": 1}
    assert report["kept"] + sum(report["dropped"].values()) == report["completions"]


def test_the_pass_rate_counts_from_the_threshold_on():
    assert report_of(GROUPS, threshold=0.5)["pass_rate"] == pytest.approx(2 / 3)


def test_many_kinds_of_failures_are_summed_up():
    failed = [[Completed(0, "", None, "failed", 0, error=f"reason {i}")] for i in range(15)]
    report = report_of(failed)
    assert len(report["failures"]) == 11 and report["failures"]["others"] == 5
    assert report["score"] is None and report["pass_rate"] is None
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_table_tells_the_main_numbers_and_every_reason():
    lines = "\n".join(in_lines(report_of(GROUPS)))
    for wanted in (
        "33.3% of the completions score 1 or more",
        "mean 0.5, from 0 to 1",
        "dropped, truncated",
        "reward math",
    ):
        assert wanted in lines
