"""Supervised fine-tuning from its configuration to the model it leaves behind, on tiny models."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from runs import (
    QUIET,
    column,
    config_of,
    flags_of,
    in_process,
    killed,
    metrics,
    same_bits,
    saved_weights,
    sums,
    train,
    without_clock,
    write_rows,
)
from whet import cli
from whet.compose import compose
from whet.errors import CheckpointError, DataError, TrainingError
from whet.models.tiny import make_tiny

LORA = {"model__adapter": {"rank": 4, "dropout": 0.2}, "optim__lr": 1e-2}


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Twenty sums: with eight per step an epoch is three steps, the last of four rows."""
    return write_rows(tmp_path / "rows.jsonl", sums(20))


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    return write_rows(tmp_path / "held_out.jsonl", sums(40)[-10:])


@pytest.fixture
def config(tmp_path: Path, tiny_qwen: Path, rows: str):
    """A run of six steps over the sums; settings of the test's own go by keyword."""

    def make(name: str | Path = "out", **settings: Any):
        base = {"model__path": str(tiny_qwen), "data__train": rows, "optim__lr": 1e-3, "train__steps": 6}
        where = name if isinstance(name, Path) else tmp_path / name
        return config_of("sft", where, **{**base, **settings})

    return make


# --- learning ---------------------------------------------------------------------------------------------


def test_loss_falls_on_real_rows_and_on_held_out_ones(tmp_path: Path, shared_data: Path):
    texts = [json.loads(line) for line in (shared_data / "gsm8k_train.jsonl").open(encoding="utf-8")][:200]
    model = make_tiny(tmp_path / "model", tokenizer="bpe", corpus=[" ".join(row.values()) for row in texts])
    config = config_of(
        "sft",
        tmp_path / "out",
        model__path=str(model),
        data__train=f"{shared_data / 'gsm8k_train.jsonl'}@[0:200]",
        data__eval=f"{shared_data / 'gsm8k_test.jsonl'}@[0:16]",
        data__columns={"prompt": "question", "response": "answer"},
        train__steps=24,
        optim__lr=5e-3,
        eval__every_steps=8,
        eval__at_start=True,
    )
    train(config)
    losses, held_out = column(tmp_path / "out", "loss"), column(tmp_path / "out", "eval/loss")
    assert losses[0] == pytest.approx(math.log(1024), abs=0.3)  # it knows nothing of its 1024 tokens
    assert sum(losses[-4:]) / 4 < losses[0] - 1.5
    assert len(held_out) == 4
    assert held_out == sorted(held_out, reverse=True)


def test_lora_trains_the_adapter_and_leaves_the_base_as_it_was(config, tmp_path: Path, tiny_qwen: Path):
    run = train(config(**LORA))
    model, base = run.policy.backend.model, load_file(tiny_qwen / "model.safetensors")
    state = {name.replace(".base_layer", ""): tensor for name, tensor in model.base_model.model.state_dict().items()}
    assert all(state[name].equal(tensor) for name, tensor in base.items())
    adapter = saved_weights(tmp_path / "out")
    assert adapter and all("lora_" in name for name in adapter)
    assert all(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)  # they begin at 0
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_frozen_layers_stay_as_they_were_and_others_move(config, tmp_path: Path, tiny_qwen: Path):
    train(config(model__freeze={"layers": 1, "embeddings": True, "patterns": [r"layers\.1\.mlp\."]}))
    before, after = saved_weights(tiny_qwen), saved_weights(tmp_path / "out")
    moved = {name for name in before if not after[name].equal(before[name])}
    assert moved == {
        name
        for name in before
        if "layers.0." not in name and "embed_tokens" not in name and "layers.1.mlp." not in name
    }
    assert any("layers.1.self_attn" in name for name in moved)


def test_bf16_autocast_keeps_float32_weights_and_comes_near_float32(config, tmp_path: Path):
    train(config("exact", train__steps=20))
    train(config("mixed", train__steps=20, backend__precision="bf16"))
    exact, mixed = (column(tmp_path / name, "loss") for name in ("exact", "mixed"))
    assert mixed != exact
    assert mixed == pytest.approx(exact, rel=0.02)
    assert mixed[-1] < mixed[0] - 0.5
    assert {tensor.dtype for tensor in saved_weights(tmp_path / "mixed").values()} == {torch.float32}


def test_accumulation_gives_the_weights_of_one_large_batch(config, tmp_path: Path):
    train(config("large", train__batch_size=8))
    train(config("small", train__batch_size=2, train__accumulation=4, backend__micro_batch_size=2))
    large, small = (saved_weights(tmp_path / name) for name in ("large", "small"))
    assert max(float((large[name] - small[name]).abs().max()) for name in large) < 1e-5
    assert column(tmp_path / "small", "loss") == pytest.approx(column(tmp_path / "large", "loss"), abs=1e-5)


def test_a_row_longer_than_a_micro_batch_stands_alone_and_changes_nothing(config, tmp_path: Path):
    long = {"prompt": "say a: ", "response": "a" * 90}
    mixed = write_rows(tmp_path / "mixed.jsonl", [*sums(12), long])
    for name, tokens in (("roomy", 8192), ("narrow", 16)):
        train(config(name, data__train=mixed, backend__max_tokens_per_device=tokens, data__shuffle=False))
    assert column(tmp_path / "narrow", "loss") == pytest.approx(column(tmp_path / "roomy", "loss"), abs=1e-5)


def test_rows_over_the_limit_are_cut_only_as_far_as_allowed(config, tmp_path: Path):
    long = [{"prompt": "say a: ", "response": "a" * 90}]
    data = write_rows(tmp_path / "long.jsonl", sums(20) + long)
    with pytest.raises(DataError, match=r"max_cut_share"):
        compose(config(data__train=data, data__max_length=64, data__max_cut_share=0.01))
    run = compose(config(data__train=data, data__max_length=64, data__max_cut_share=0.1))
    assert max(run.feed.train.lengths) == 64
    assert run.feed.train.report.truncated == 1


# --- when things happen -----------------------------------------------------------------------------------


def test_epochs_count_partial_windows_and_fractions(config, tmp_path: Path):
    train(config(train__steps=None, train__epochs=2.5))  # 20 rows, 8 per step: 3 steps an epoch, 2.5 epochs: 7.5
    lines = metrics(tmp_path / "out", "loss")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lines[-1]["epoch"] == pytest.approx(8 / 3)
    tokens = [line["num_tokens"] for line in lines]
    rows_per_epoch = tokens[2]
    assert tokens[5] == 2 * rows_per_epoch  # each epoch sees every row once


@pytest.mark.parametrize(
    "settings,steps",
    [
        ({"eval__every_steps": 4}, [4, 6]),
        ({"eval__every_epochs": 1, "eval__at_start": True}, [0, 3, 6]),
        ({"eval__every_steps": 4, "eval__at_end": False}, [4]),
        ({}, [6]),
    ],
)
def test_evaluations_come_when_they_were_asked_for(config, tmp_path: Path, held_out: str, settings, steps):
    train(config(data__eval=held_out, **settings))
    lines = metrics(tmp_path / "out", "eval/loss")
    assert [line["step"] for line in lines] == steps
    for line in lines:
        assert line["eval/perplexity"] == pytest.approx(math.exp(line["eval/loss"]))


def test_a_run_stops_early_and_ends_with_its_best_weights(config, tmp_path: Path, rows: str):
    # What is held out contradicts what is trained, so it only gets worse after a while.
    wrong = [{"prompt": row["prompt"], "response": "no"} for row in sums(10)]
    settings = {"eval__every_steps": 2, "eval__patience": 3, "checkpoint__best": True, "train__steps": 60}
    run = train(config(data__eval=write_rows(tmp_path / "wrong.jsonl", wrong), optim__lr=3e-3, **settings))
    progress, losses = run.loop.progress, column(tmp_path / "out", "eval/loss")
    best = losses.index(min(losses))
    assert progress.stopped_early and run.loop.global_step == 2 * len(losses) < 60
    assert len(losses) == best + 1 + 3
    assert (progress.best, progress.best_step) == (min(losses), 2 * (best + 1))
    best_folder = tmp_path / "out" / f"checkpoint-{progress.best_step}"
    assert same_bits(saved_weights(tmp_path / "out"), saved_weights(best_folder))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_bits(dict(model.state_dict()), dict(run.policy.backend.model.state_dict()))


def test_old_checkpoints_go_and_the_best_one_stays(config, tmp_path: Path, held_out: str, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr("whet.feeds.rows.evaluate_rows", lambda *_, **__: {"eval/loss": next(values)})
    settings = {"eval__every_steps": 1, "checkpoint__every_steps": 1, "checkpoint__keep": 2, "checkpoint__best": True}
    train(config(data__eval=held_out, **settings))
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    assert same_bits(saved_weights(tmp_path / "out"), saved_weights(tmp_path / "out" / "checkpoint-2"))


# --- what it leaves behind --------------------------------------------------------------------------------


def test_metrics_have_the_names_that_people_know(config, tmp_path: Path, held_out: str):
    train(config(data__eval=held_out))
    names = {name for line in metrics(tmp_path / "out") for name in line}
    assert {"loss", "mean_token_accuracy", "grad_norm", "learning_rate", "num_tokens", "entropy", "epoch"} <= names
    assert {"eval/loss", "eval/perplexity", "eval/mean_token_accuracy", "eval/entropy"} <= names
    assert {"perf/tokens_per_s", "perf/train_tokens_per_s", "perf/step_s", "perf/wait_ratio"} <= names
    others = {name for name in names if "/" not in name}
    assert others == {"step", "epoch", "masked_sequences"} | {
        *("loss", "mean_token_accuracy", "grad_norm", "learning_rate", "num_tokens", "entropy")
    }


def test_tensorboard_shows_what_metrics_jsonl_holds(config, tmp_path: Path):
    train(config(log__tensorboard=True))
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("loss")]
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in shown] == pytest.approx(column(tmp_path / "out", "loss"))


def test_the_exported_folder_is_a_plain_transformers_model(config, tmp_path: Path, tiny_qwen: Path):
    run = train(config(checkpoint__every_steps=6))
    ours = run.policy.backend.model.eval()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-6"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer("3+4=", return_tensors="pt")
        with torch.no_grad():
            assert model(**tokens).logits.equal(ours(**tokens).logits)
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_qwen).chat_template
        assert "whet" not in (folder / "config.json").read_text()
        assert "attn" not in (folder / "config.json").read_text()
        # Others may read it: safetensors by itself writes for the owner alone.
        assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    assert (tmp_path / "out" / "README.md").is_file()
    assert (tmp_path / "out" / "run.yaml").is_file()


def test_an_exported_adapter_loads_in_peft_with_the_same_logits(config, tmp_path: Path):
    run = train(config(**LORA))
    tokens = run.policy.tokenizer("3+4=", return_tensors="pt")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert theirs(**tokens).logits.equal(run.policy.backend.model.eval()(**tokens).logits)


# --- going on ---------------------------------------------------------------------------------------------

KILLS = {
    "with a gradient, before the step": ("whet.backends.local.LocalBackend.optim_step", 4, "before"),
    "after the step, before it is logged": ("whet.log.RunLog.log", 4, "before"),
    "logged, but not saved": ("whet.keeper.Keeper.save", 2, "before"),
    "half of the checkpoint written": ("whet.keeper.save_rng", 2, "before"),
    "written, but not in its place": ("whet.checkpoints.save._seal", 2, "after"),
    "in its place, old ones not removed": ("whet.keeper.prune", 2, "before"),
    "while the final model is written": ("whet.compose.write_card", 1, "before"),
}
KINDS = {"full": {}, "lora with dropout": LORA}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_qwen: Path):
    """Weights, metrics and settings of runs that nothing happened to, by kind."""
    folder = tmp_path_factory.mktemp("undisturbed")
    common = {
        "model__path": str(tiny_qwen),
        "data__train": write_rows(folder / "rows.jsonl", sums(20)),
        "data__eval": write_rows(folder / "held_out.jsonl", sums(30)[-6:]),
        "optim__lr": 1e-3,
        "train__steps": 7,
        "eval__every_steps": 3,
        "checkpoint__every_steps": 2,
        "checkpoint__keep": 1,
    }
    found = {}
    for kind, settings in KINDS.items():
        output = folder / kind.split()[0]
        train(config_of("sft", output, **{**common, **settings}))
        found[kind] = {**common, **settings}, saved_weights(output), without_clock(metrics(output))
    return found


@pytest.mark.parametrize(
    "kind,moment", [*(("full", moment) for moment in KILLS), ("lora with dropout", "half of the checkpoint written")]
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(undisturbed, tmp_path: Path, kind: str, moment: str):
    settings, weights, lines = undisturbed[kind]
    config = config_of("sft", tmp_path / "out", **settings)
    assert killed(config, *KILLS[moment]) == -signal.SIGKILL
    train(config)
    assert same_bits(saved_weights(tmp_path / "out"), weights)
    assert without_clock(metrics(tmp_path / "out")) == lines
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-7"]


def test_a_run_may_be_killed_over_and_over(undisturbed, tmp_path: Path):
    settings, weights, lines = undisturbed["full"]
    config = config_of("sft", tmp_path / "out", **settings)
    for call in (3, 3, 3):  # two steps on, one lost, each time
        assert killed(config, "whet.log.RunLog.log", call, "after") == -signal.SIGKILL
    train(config)
    assert same_bits(saved_weights(tmp_path / "out"), weights)
    assert without_clock(metrics(tmp_path / "out")) == lines


def test_a_checkpoint_given_by_its_path_is_gone_on_from(undisturbed, tmp_path: Path):
    settings, weights, lines = undisturbed["full"]
    train(config_of("sft", tmp_path / "first", **{**settings, "checkpoint__keep": None}))
    given = str(tmp_path / "first" / "checkpoint-4")
    train(config_of("sft", tmp_path / "second", **settings, checkpoint__resume=given))
    assert same_bits(saved_weights(tmp_path / "second"), weights)
    assert without_clock(metrics(tmp_path / "second")) == [line for line in lines if line["step"] > 4]


def test_a_finished_run_trains_no_further(undisturbed, tmp_path: Path):
    settings, weights, lines = undisturbed["full"]
    config = config_of("sft", tmp_path / "out", **settings)
    train(config)
    (tmp_path / "out" / "model.safetensors").unlink()
    run = train(config)
    assert run.loop.global_step == 7
    assert same_bits(saved_weights(tmp_path / "out"), weights)
    assert without_clock(metrics(tmp_path / "out")) == lines


def test_early_stops_and_best_weights_survive_a_kill(config, tmp_path: Path, rows: str):
    wrong = write_rows(tmp_path / "wrong.jsonl", [{"prompt": row["prompt"], "response": "no"} for row in sums(10)])
    settings = {"eval__every_steps": 2, "eval__patience": 3, "checkpoint__best": True, "checkpoint__every_steps": 3}
    settings |= {"data__eval": wrong, "optim__lr": 3e-3, "train__steps": 60}
    whole = train(config("whole", **settings))
    last = whole.loop.global_step
    assert whole.loop.progress.stopped_early
    halves = config("halves", **settings)
    assert killed(halves, "whet.backends.local.LocalBackend.optim_step", last - 1, "after") == -signal.SIGKILL
    run = train(halves)
    assert run.loop.progress == whole.loop.progress
    assert same_bits(saved_weights(tmp_path / "halves"), saved_weights(tmp_path / "whole"))


def test_changed_data_are_refused(config, tmp_path: Path, rows: str):
    train(config(checkpoint__every_steps=3, train__steps=3))
    write_rows(Path(rows), sums(21))
    with pytest.raises(CheckpointError, match=r"made with other data: its number of rows is 20, now it is 21"):
        compose(config())
    write_rows(Path(rows), [*sums(19), {"prompt": "1+1=", "response": "3"}])
    with pytest.raises(CheckpointError, match=r"made with other data: its content"):
        compose(config())


@pytest.mark.parametrize(
    "settings,text",
    [
        ({"model__freeze": {"layers": 1}}, "is for 24 trained tensors, but the model has 13"),
        ({"model__path": "other"}, "does not fit the model: size mismatch"),
    ],
)
def test_another_model_or_freezing_is_refused(config, tmp_path: Path, settings: dict, text: str):
    train(config(checkpoint__every_steps=3, train__steps=3))
    if "model__path" in settings:
        settings = {"model__path": str(make_tiny(tmp_path / "other", hidden_size=32))}
    with pytest.raises(CheckpointError, match=text):
        compose(config(**settings))


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(config, tmp_path: Path):
    run = compose(config(checkpoint__every_steps=1, checkpoint__keep=1))

    def spoil(loop) -> None:
        if loop.global_step == 3:
            next(loop.policy.model.parameters()).data[0, 0] = math.nan

    run.loop.callbacks.append(spoil)
    with pytest.raises(TrainingError, match=r"embed_tokens.weight holds numbers that are not finite"):
        asyncio.run(run.train())
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-2"]
    assert train(config()).loop.global_step == 6


def test_a_run_stays_where_it_was_made_when_the_working_folder_changes(config, tmp_path: Path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    shutil.copytree(config().model.path, tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    run = compose(config(Path("out"), model__path="model", checkpoint__every_steps=3, **LORA))
    monkeypatch.chdir(tmp_path / "there")
    asyncio.run(run.train())
    assert list((tmp_path / "there").iterdir()) == []
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "here" / "out")


def test_another_seed_is_refused_and_another_length_is_not(config, rows: str, tmp_path: Path):
    train(config(checkpoint__every_steps=3, train__steps=3))
    with pytest.raises(CheckpointError, match=r"its seed is 0, now it is 1"):
        compose(config(seed=1))
    assert train(config(train__steps=5)).loop.global_step == 5
    assert [line["step"] for line in metrics(tmp_path / "out", "loss")] == [1, 2, 3, 4, 5]


def _interrupted(arguments: list[str], metrics_file: Path, signal_number: int, lines: int) -> int:
    """The command line in this process, with a signal after so many lines of metrics."""

    def watch() -> None:
        while not metrics_file.exists() or metrics_file.read_text().count("\n") < lines:
            time.sleep(0.001)
        os.kill(os.getpid(), signal_number)

    threading.Thread(target=watch, daemon=True).start()
    return cli.main(arguments)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_in_order_with_a_checkpoint(config, tmp_path: Path, tiny_qwen: Path, rows: str, number):
    flags = {"model.path": str(tiny_qwen), "data.train": rows, "data.cache_dir": str(tmp_path / "cache"), **QUIET}
    flags |= {"optim.lr": 1e-3, "optim.schedule": "constant", "train.steps": 400, "output_dir": str(tmp_path / "out")}
    assert in_process(_interrupted, ["sft", *flags_of(flags)], tmp_path / "out" / "metrics.jsonl", number, 3)[0] == 130
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 3 <= step < 400
    assert len(metrics(tmp_path / "out")) == step
    settings = {"train__steps": step + 3, "optim__schedule": "constant"}
    train(config(**settings))
    train(config("whole", **settings))
    assert same_bits(saved_weights(tmp_path / "out"), saved_weights(tmp_path / "whole"))
    assert without_clock(metrics(tmp_path / "out")) == without_clock(metrics(tmp_path / "whole"))
