"""The command line: what it answers, where it says so, and with which exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runs import QUIET, flags_of, metrics, saved_weights, sums, write_rows
from whet import __version__, cli
from whet.models.tiny import make_tiny

Files = Callable[..., list[str]]


@pytest.fixture
def flags(tmp_path: Path, tiny_qwen: Path) -> Files:
    """Flags of a short run over sums; settings of the test's own go by keyword."""
    rows = write_rows(tmp_path / "rows.jsonl", [{**row, "label": row["response"]} for row in sums(8)])

    def make(**settings) -> list[str]:
        base = {"model__path": str(tiny_qwen), "data__train": rows, "data__cache_dir": str(tmp_path / "cache")}
        given = {**base, "output_dir": str(tmp_path / "out"), "train__steps": 2, **settings}
        return flags_of({**QUIET, **{name.replace("__", "."): value for name, value in given.items()}})

    return make


GRPO = {"reward": "exact", "rollout__prompts_per_step": 2, "rollout__group_size": 2, "rollout__max_tokens": 3}


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help_names_every_command_and_says_how_to_begin(capsys, arguments: list[str]):
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert all(f"whet {command}" in out for command in cli.COMMANDS.keys() - set(cli.METHODS))
    assert "whet METHOD" in out and set(cli.METHODS) <= set(out.split())
    assert "data: {train: rows.jsonl}" in out and "docs/configuration.md" in out
    assert err == ""


@pytest.mark.parametrize("command", ["sft", "grpo", "eval", "chat", "merge", "import", "demo"])
def test_every_command_explains_itself(capsys, command: str):
    assert cli.main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert f"whet {command}" in out and len(out.splitlines()) >= 4
    assert err == ""


def test_help_of_a_method_lists_every_setting(capsys):
    cli.main(["sft", "--help"])
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in ("optim.lr", "model.adapter.rank", "checkpoint.every_steps", "seed"))


@pytest.mark.parametrize("argument", ["--version", "-V"])
def test_the_version_is_that_of_the_package(capsys, argument: str):
    assert cli.main([argument]) == 0
    assert capsys.readouterr().out == f"whet {__version__}\n"


def test_an_unknown_command_is_refused_with_the_nearest(capsys):
    assert cli.main(["stf", "config.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "'stf'" in err and "did you mean sft?" in err and "--help" in err


@pytest.mark.parametrize("arguments", [["chat"], ["chat", "model", "--bogus"], ["chat", "model", "--top-p", "7"]])
def test_wrong_options_end_with_2_and_a_word_on_stderr(capsys, arguments: list[str]):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: whet chat") and "error:" in err


def test_sft_trains_from_a_file_and_flags_win(tmp_path: Path, tiny_qwen: Path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", sums(8))
    (tmp_path / "sft.yaml").write_text(
        f"model: {{path: {tiny_qwen}}}\ndata: {{train: {rows}, cache_dir: {tmp_path / 'cache'}}}\n"
        f"output_dir: {tmp_path / 'out'}\ntrain: {{steps: 7, batch_size: 4}}\nlog: {{tensorboard: false}}\n"
    )
    assert cli.main(["sft", str(tmp_path / "sft.yaml"), "--train.steps", "3", "--learning_rate", "1e-4"]) == 0
    out, err = capsys.readouterr()
    assert len(metrics(tmp_path / "out", "loss")) == 3
    assert metrics(tmp_path / "out")[0]["learning_rate"] == 1e-4
    assert "training data: 8 rows" in out and f"the final model is in {tmp_path / 'out'}" in out
    assert "step 3/3" in out and "loss" in out and "0:00:00 left" in out  # no terminal: progress in plain lines
    assert "Error" not in err
    assert "lr: 0.0001" in (tmp_path / "out" / "run.yaml").read_text()


def test_the_saved_configuration_runs_again(tmp_path: Path, flags: Files):
    assert cli.main(["sft", *flags()]) == 0
    again = str(tmp_path / "again")
    assert cli.main(["sft", str(tmp_path / "out" / "run.yaml"), "--output_dir", again]) == 0
    one, two = saved_weights(tmp_path / "out"), saved_weights(tmp_path / "again")
    assert all(one[name].equal(two[name]) for name in one)


def test_grpo_trains(tmp_path: Path, flags: Files):
    assert cli.main(["grpo", *flags(**GRPO)]) == 0
    assert [line["step"] for line in metrics(tmp_path / "out", "rollout/reward")] == [1, 2]


def test_eval_prints_one_metric_per_line(tmp_path: Path, flags: Files, capsys):
    rows = str(tmp_path / "rows.jsonl")
    assert cli.main(["eval", *flags(data__eval=rows)]) == 0
    losses = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("eval/"))
    assert float(losses["eval/loss"]) > 0
    assert cli.main(["eval", *flags(data__eval=rows, method="grpo", **GRPO)]) == 0
    out = capsys.readouterr().out
    assert "eval/reward " in out and "eval/pass@1 " in out
    assert "[eval/0] reward" in out and "1+1=" in out and "->" in out
    assert not (tmp_path / "out").exists()


def test_chat_answers_until_an_empty_line(tiny_qwen: Path, monkeypatch, capsys):
    lines = iter(["1+1=", "and now?", ""])
    prompts: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt: (prompts.append(prompt), next(lines))[1])
    assert cli.main(["chat", str(tiny_qwen), "--max-tokens", "4", "--temperature", "0", "--system", "Be brief."]) == 0
    assert prompts == ["> "] * 3
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_chat_ends_with_its_input(tiny_qwen: Path, monkeypatch):
    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert cli.main(["chat", str(tiny_qwen)]) == 0


def test_chat_cuts_an_answer_where_the_positions_end(tmp_path: Path, monkeypatch, capsys):
    model = make_tiny(tmp_path / "short", max_positions=24)
    lines = iter(["1+1=", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", str(model), "--plain"]) == 0  # 512 tokens by default
    assert "Error" not in capsys.readouterr().err


def test_chat_says_at_once_that_a_model_cannot_talk(tmp_path: Path, monkeypatch, capsys):
    model = make_tiny(tmp_path / "mute", chat_template=False)
    monkeypatch.setattr("whet.chat.load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    assert cli.main(["chat", str(model)]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_an_interrupt_elsewhere_ends_with_130(monkeypatch, capsys):
    def interrupt(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "sft", interrupt)
    assert cli.main(["sft"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_process_of_its_own_trains_and_fails_as_it_should(tmp_path: Path, flags: Files):
    """One real process each; elsewhere, with a space and letters beyond ASCII in every path."""
    folder = tmp_path / "a folder, größer 数据"
    folder.mkdir()
    write_rows(folder / "rows.jsonl", sums(4))
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "200"}
    settings = {"data__train": "rows.jsonl", "output_dir": "runs/größe", "log__progress": True, "data__cache_dir": "c"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "whet.cli", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    trained = run("sft", *flags(**settings))
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""  # no bar or warning of a library
    assert "the final model is in runs/größe" in trained.stdout
    assert (folder / "runs" / "größe" / "model.safetensors").is_file()
    failed = run("sft", *flags(**settings, optim__lrr="1"))
    assert failed.returncode == 2
    assert "optim.lrr is not a setting" in failed.stderr and "Traceback" not in failed.stderr
    assert failed.stdout == ""


def test_the_package_runs_as_the_command_does():
    told = subprocess.run([sys.executable, "-m", "whet", "--help"], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0 and "grpo" in told.stdout
