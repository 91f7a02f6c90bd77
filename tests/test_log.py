"""The run's log: what stands in the files and on the screen, fresh, resumed and cut short."""

import json
import logging
import math
import os
import subprocess
import sys

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from whet import log
from whet.config.train import LogConfig
from whet.errors import CheckpointError
from whet.log import RunLog, drop_lines_after, quiet_libraries, setup_logging

PLAIN = LogConfig(tensorboard=False, progress=False)


@pytest.fixture
def own_logging():
    """Let a test set up the logger, and put it back."""
    logger = logging.getLogger("whet")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    yield logger
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(folder, steps, config=PLAIN, *, total_steps=6, resume_step=0):
    with RunLog(folder, config, total_steps=total_steps, resume_step=resume_step) as run_log:
        for step in steps:
            run_log.log(step, {"train/loss": 1 / step})
            if step % 3 == 0:
                run_log.log(step, {"eval/loss": 2 / step})
    return run_log.path


def test_every_record_is_one_json_line_written_at_once(tmp_path):
    with RunLog(tmp_path, PLAIN, total_steps=2) as run_log:
        run_log.log(1, {"train/loss": 2.5, "train/num_tokens": 7})
        assert records(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 2.5, "train/num_tokens": 7}]


def test_a_resumed_file_equals_an_undisturbed_one(tmp_path):
    whole = write_steps(tmp_path / "whole", range(1, 7))
    broken = write_steps(tmp_path / "broken", range(1, 6))
    with broken.open("a") as file:
        file.write('{"step": 6, "train/lo')  # cut short by the kill
    write_steps(tmp_path / "broken", range(4, 7), resume_step=3)
    assert broken.read_text() == whole.read_text()
    assert [path.name for path in broken.parent.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_an_empty_file(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1])
    assert records(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 1.0}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2 .*nonsense.*remove the line"):
        drop_lines_after(path, 1)
    assert path.read_text().count("\n") == 3


def test_numbers_that_json_cannot_write_are_null(tmp_path):
    with RunLog(tmp_path, PLAIN, total_steps=1) as run_log:
        run_log.log(1, {"train/loss": math.nan, "train/kl": -math.inf, "train/lr": 0.0})
    text = run_log.path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert records(run_log.path) == [{"step": 1, "train/loss": None, "train/kl": None, "train/lr": 0.0}]


def test_training_metrics_are_thinned_but_evaluations_and_the_last_step_are_not(tmp_path):
    path = write_steps(
        tmp_path, range(1, 8), LogConfig(tensorboard=False, progress=False, every_steps=5), total_steps=7
    )
    assert [(r["step"], *r.keys() - {"step"}) for r in records(path)] == [
        (3, "eval/loss"),
        (5, "train/loss"),
        (6, "eval/loss"),
        (7, "train/loss"),
    ]


def test_tensorboard_hides_what_the_killed_run_wrote_after_the_checkpoint(tmp_path):
    config = LogConfig(progress=False)
    write_steps(tmp_path, range(1, 6), config)
    with RunLog(tmp_path, config, total_steps=6, resume_step=3) as run_log:
        for step in (4, 5, 6):
            run_log.log(step, {"train/loss": 10.0 * step})
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    shown = [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")]
    assert shown == [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 40.0), (5, 50.0), (6, 60.0)]


def test_without_a_terminal_few_plain_lines_are_printed_once(tmp_path, capsys, own_logging):
    setup_logging()
    setup_logging()
    with RunLog(tmp_path, LogConfig(tensorboard=False), total_steps=50) as run_log:
        run_log.message("hello")
        for step in range(1, 51):
            run_log.log(step, {"train/loss": 2.0, "perf/tokens_per_s": 12345.0, "train/lr": 0.5})
        run_log.log(50, {"eval/loss": 1.5})
    lines = [line.split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "hello"
    assert lines[1].startswith("step 1/50 · train/loss 2 · perf/tokens_per_s 12,345 · ")
    assert lines[2:] == [
        "step 50/50 · train/loss 2 · perf/tokens_per_s 12,345 · 0:00:00 left",
        "step 50: eval/loss 1.5",
    ]


def test_time_left_counts_only_the_steps_of_this_run(tmp_path, capsys, own_logging, monkeypatch):
    setup_logging()
    clock = iter([100.0, 106.0])  # start; step 12: two steps took 6 s, four are left
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    with RunLog(tmp_path, LogConfig(tensorboard=False), total_steps=16, resume_step=10) as run_log:
        run_log.log(12, {"train/loss": 2.0})
    assert "step 12/16 · train/loss 2 · 0:00:12 left" in capsys.readouterr().out


def test_on_a_terminal_the_bar_shows_loss_speed_and_time_left(tmp_path, monkeypatch, own_logging):
    terminal = Console(force_terminal=True, width=120, record=True, file=(tmp_path / "screen").open("w"))
    monkeypatch.setattr(log, "console", lambda: terminal)
    setup_logging()
    with RunLog(tmp_path / "run", LogConfig(tensorboard=False), total_steps=2) as run_log:
        run_log.log(1, {"train/loss": 2.25, "perf/tokens_per_s": 900.0})
        run_log.message("half-way")
        run_log.log(2, {"train/loss": 2.125, "perf/tokens_per_s": 950.0})
    terminal.file.flush()
    screen = (tmp_path / "screen").read_text()
    assert "train/loss 2.125 · perf/tokens_per_s 950 · 0:00:00 left" in screen
    assert "2/2" in screen
    assert screen.count("half-way") == 1


def test_a_tensor_is_no_metric(tmp_path):
    import torch

    with RunLog(tmp_path, PLAIN, total_steps=1) as run_log, pytest.raises(AssertionError, match="train/loss"):
        run_log.log(1, {"train/loss": torch.tensor(1.0)})  # type: ignore[dict-item]


def test_libraries_are_quiet_unless_the_user_asked_otherwise(monkeypatch):
    monkeypatch.setattr(os, "environ", {"TRANSFORMERS_VERBOSITY": "debug"})
    quiet_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_the_log_loads_without_torch():
    code = "import sys, whet.log; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
