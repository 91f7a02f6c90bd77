"""Preferences out of judged solutions: the rows of each file, the side of each question, and that they load."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whet.config.data import DataConfig
from whet.data.prepare import prepare
from whet.data.shapes import Task
from whet.models.tiny import make_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "gsm8k_preferences.py"
TASKS: tuple[Task, ...] = ("preference", "unpaired", "reward")

Convert = Callable[..., dict[str, list[dict[str, Any]]]]


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Runs the script on a file, or on rows, and returns the rows of every file that it wrote."""

    def convert(given: Path | list[dict], *options: str) -> dict[str, list[dict[str, Any]]]:
        path = given if isinstance(given, Path) else tmp_path / "solutions.jsonl"
        if not isinstance(given, Path):
            path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, str(path), "--output-dir", str(out), *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        files = sorted(out.iterdir())
        return {file.stem: [json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files}

    return convert


def row(question: str, **solutions: str) -> dict[str, Any]:
    """A question with solutions; those named `good…` are correct."""
    judged = {name: {"is_correct": name.startswith("good"), "solution": text} for name, text in solutions.items()}
    return {"question": question, "ground_truth": "A: 1", **judged}


def test_every_correct_solution_meets_every_incorrect_one(convert: Convert):
    files = convert([row("q", good1="a", bad1="x", good2="b", bad2="y", good3="a")], "--held-out", "0")
    pairs = [(each["chosen"], each["rejected"]) for each in files["gsm8k_preference_train"]]
    assert pairs == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    assert {each["prompt"] for each in files["gsm8k_preference_train"]} == {"q"}
    assert [(each["completion"], each["label"]) for each in files["gsm8k_unpaired_train"]] == [
        *(("a", True), ("b", True), ("x", False), ("y", False)),
    ]
    asked = {"role": "user", "content": "q"}
    assert files["gsm8k_reward_train"][1] == {
        "chosen": [asked, {"role": "assistant", "content": "a"}],
        "rejected": [asked, {"role": "assistant", "content": "y"}],
    }
    assert not any(rows for name, rows in files.items() if name.endswith("held_out"))


def test_a_question_without_both_kinds_gives_labels_and_no_pairs(convert: Convert):
    files = convert([row("q", good1="a"), row("r", bad1="x")], "--held-out", "0")
    assert (files["gsm8k_preference_train"], files["gsm8k_reward_train"]) == ([], [])
    assert [each["label"] for each in files["gsm8k_unpaired_train"]] == [True, False]


def test_pairs_of_a_question_are_limited(convert: Convert):
    files = convert([row("q", good1="a", good2="b", bad1="x", bad2="y")], "--held-out", "0", "--max-pairs", "3")
    assert len(files["gsm8k_preference_train"]) == len(files["gsm8k_reward_train"]) == 3


@pytest.mark.parametrize("options", [["--max-pairs", "0"], ["--held-out", "1"]])
def test_options_without_sense_are_refused(convert: Convert, options: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        convert([row("q", good1="a")], *options)
    assert "--max-pairs must be at least 1, and --held-out" in capsys.readouterr().err


def test_no_question_is_on_both_sides(convert: Convert):
    files = convert([row(f"q{i}", good1="a", bad1="x") for i in range(200)])
    sides = [
        {each["prompt"] for task in ("preference", "unpaired") for each in files[f"gsm8k_{task}_{part}"]}
        for part in ("train", "held_out")
    ]
    assert sides[0].isdisjoint(sides[1]) and len(sides[0]) + len(sides[1]) == 200
    # 200 draws at a fifth: 40, standard deviation 5.7.
    assert 20 < len(sides[1]) < 60
    fewer = convert([row(f"q{i}", good1="a", bad1="x") for i in range(100)])["gsm8k_preference_held_out"]
    assert {each["prompt"] for each in fewer} <= sides[1]


def test_real_solutions_become_rows_that_every_task_reads(convert: Convert, shared_data: Path, tmp_path: Path):
    files = convert(shared_data / "gsm8k_model_solutions.jsonl")
    # Two questions have 2 x 1 or 1 x 2 different solutions, 290 + 204 of them 1 x 3 or 3 x 1, and 235 have 2 x 2.
    assert sum(len(files[f"gsm8k_preference_{part}"]) for part in ("train", "held_out")) == 2 * 2 + 494 * 3 + 235 * 4
    cfg = DataConfig(cache_dir=str(tmp_path / "cache"), chat="always")
    for task in TASKS:
        path = tmp_path / "out" / f"gsm8k_{task}_held_out.jsonl"
        prepared = prepare(cfg, f"{path}@[:100]", make_tokenizer("bytes"), task=task)
        assert (len(prepared), prepared.report.dropped, prepared.report.identical) == (100, 0, 0)
        assert prepared.label_counts is not None and sum(prepared.label_counts) == (100 if task == "unpaired" else 200)


def test_the_script_stays_short():
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) < 100
