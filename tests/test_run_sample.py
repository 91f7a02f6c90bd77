"""Rejection sampling from its configuration to the rows it leaves behind, killed and resumed, on tiny models."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from reward_models import make_reward_model
from runs import QUIET, at_call, column, config_of, flags_of, in_process, saved_weights, sums, train, write_rows
from whet import cli
from whet.errors import CheckpointError, ConfigError, DataError, EngineError, RewardError, WhetError
from whet.models.tiny import make_tiny
from whet.rewards.score import NamedReward, RewardScorer
from whet.rollout.episode import Play
from whet.sample.run import SampleRun, compose_sampling
from whet.types import Episode

ROOT = Path(__file__).resolve().parent
FILES = ("rows.jsonl", "report.json", "scores.png")
NUM_PROMPTS = 12


def letters(episode: Episode) -> float:
    """Different for nearly every response."""
    return sum(map(ord, episode.response)) % 97 / 10


async def moody(episode: Episode) -> float:
    """Fails for one in three."""
    await asyncio.sleep(0)
    if episode.index == 1:
        raise ValueError("not in the mood")
    return letters(episode)


def broken(episode: Episode) -> float:
    raise OSError("the grader is not there")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return write_rows(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"], "label": r["response"]} for r in sums(12)])


@pytest.fixture
def config(tmp_path: Path, tiny_qwen: Path, prompts: str):
    """Twelve prompts, four at a time, three answers each; settings of the test's own go by keyword."""

    def make(name: str = "out", **settings: Any):
        base = {
            **{"model__path": str(tiny_qwen), "data__train": prompts, "reward": "test_run_sample:letters"},
            **{"rollout__prompts_per_step": 4, "rollout__group_size": 3, "rollout__max_tokens": 6},
            "sample__keep_truncated": True,
        }
        given = {**base, **settings}
        made = config_of("sample", tmp_path / name, **{k: v for k, v in given.items() if v is not ...})
        return made.model_copy(update={"data": made.data.model_copy(update={"cache_dir": None})})

    return make


def sample(config: Any) -> dict[str, Any] | None:
    return asyncio.run(compose_sampling(config).sample())


def rows_in(folder: Path, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


# --- what comes out ---------------------------------------------------------------------------------------


def test_every_prompt_is_answered_and_the_best_answer_is_its_row(config, tmp_path: Path):
    report = sample(config())
    rows = rows_in(tmp_path / "out")
    assert [row["group"] for row in rows] == [f"g{i}" for i in range(NUM_PROMPTS)]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in sums(NUM_PROMPTS)]
    assert [row["metadata"] for row in rows] == [{"label": row["response"]} for row in sums(NUM_PROMPTS)]
    everything = sample(config(sample__select="all"))  # made anew from the journal
    by_group: dict[str, list[float]] = {}
    for row in rows_in(tmp_path / "out"):
        assert row["score"] == letters(Episode(None, "g", 0, tokens=[1], response=row["response"]))  # type: ignore
        by_group.setdefault(row["group"], []).append(row["score"])
    assert [row["score"] for row in rows] == [max(by_group[row["group"]]) for row in rows]
    assert report and everything and report["completions"] == everything["completions"] == 36
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == everything
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_another_selection_samples_nothing_anew(config, tmp_path: Path, monkeypatch):
    sample(config())
    monkeypatch.setattr("whet.sample.run.load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    assert sample(config(sample__select="pairs", sample__output=str(tmp_path / "elsewhere" / "pairs.jsonl")))
    pairs = rows_in(tmp_path / "elsewhere", "pairs.jsonl")
    assert pairs and all(row["margin"] == row["score"][0] - row["score"][1] > 0 for row in pairs)
    sample(config(sample__select="labels", sample__threshold=5.0))
    assert {row["label"] for row in rows_in(tmp_path / "out")} == {True, False}


def test_prompts_of_messages_make_rows_of_messages(config, tmp_path: Path):
    asked = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]
    file = write_rows(tmp_path / "chat.jsonl", [{"prompt": asked}])
    sample(config(data__train=file))
    (row,) = rows_in(tmp_path / "out")
    assert row["prompt"] == asked and row["response"][0]["role"] == "assistant"


def test_several_rewards_make_a_weighted_sum(config, tmp_path: Path, tiny_qwen: Path):
    model = make_reward_model(tiny_qwen, tmp_path / "reward")
    both = [{"use": "test_run_sample:letters", "weight": 0.5}, {"use": "model", "path": str(model), "weight": 2.0}]
    report = sample(config(reward=both))
    for row in rows_in(tmp_path / "out"):
        assert row["score"] == 0.5 * row["rewards"]["letters"] + 2.0 * row["rewards"]["model"]
    assert report and set(report["rewards"]) == {"letters", "model"}


def test_memory_is_bounded_by_two_steps(config, monkeypatch):
    under_way = most = 0
    original = Play.run

    async def counted(play, *arguments, **options):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return await original(play, *arguments, **options)
        finally:
            under_way -= 1

    monkeypatch.setattr(Play, "run", counted)
    sample(config())
    assert most == 4 * 3  # a step at a time, all of it together


def test_the_reward_model_of_sampling_serves_reinforcement_too(config, tmp_path: Path, tiny_qwen: Path, prompts: str):
    model = make_reward_model(tiny_qwen, tmp_path / "reward")
    settings = {"model__path": str(tiny_qwen), "data__train": prompts, "train__steps": 2, "rollout__max_tokens": 4}
    reward = {"use": "model", "path": str(model)}
    trained = config_of(
        "grpo", tmp_path / "out", **settings, reward=reward, rollout__prompts_per_step=2, rollout__group_size=3
    )
    train(trained)
    assert all(value != 0 for value in column(tmp_path / "out", "rollout/reward/model"))
    assert column(tmp_path / "out", "rollout/num_failed") == [0, 0]


# --- failures ---------------------------------------------------------------------------------------------


def test_a_failed_completion_is_counted_with_its_reason_and_the_run_goes_on(config, tmp_path: Path, caplog):
    report = sample(config(reward="test_run_sample:moody"))
    assert report and (report["failed"], report["scored"], report["rows"]) == (12, 24, 12)
    assert report["failures"] == {"reward 'moody' raised ValueError: not in the mood": 12}
    assert report["dropped"]["failed"] == 12
    assert all(row["index"] != 1 for row in rows_in(tmp_path / "out"))


def test_when_all_fail_the_run_ends_and_what_failed_is_tried_again(config, tmp_path: Path):
    with pytest.raises(RewardError, match=r"all 12 episodes .* the grader is not there"):
        sample(config(reward="test_run_sample:broken"))
    assert not (tmp_path / "out" / "rows.jsonl").exists()
    report = asyncio.run(judged_by(config(reward="test_run_sample:broken"), letters).sample())
    assert report and report["failed"] == 0 and report["prompts"] == NUM_PROMPTS


def judged_by(config: Any, function: Any) -> SampleRun:
    """The run with another function in the place of its reward, as after a repair."""
    run = compose_sampling(config)
    run.feed.scorer = RewardScorer([NamedReward("letters", function)])
    return run


def test_a_selection_without_rows_is_told_with_the_reasons(config, tmp_path: Path):
    with pytest.raises(DataError, match=r"no row is selected: of 36 completions .*36 score below min_score"):
        sample(config(sample__min_score=1000.0))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"] == 0


def test_a_failing_engine_ends_the_run_and_what_was_done_stays(config, tmp_path: Path, undisturbed):
    def fail(*_: Any) -> None:
        raise EngineError("the engine is gone")

    with (
        at_call("whet.engines.local.engine.LocalEngine._step", 9, "before", lambda: fail()),
        pytest.raises(EngineError),
    ):
        sample(config())
    sample(config())
    assert content(tmp_path / "out") == undisturbed


# --- killed and resumed -----------------------------------------------------------------------------------


@pytest.fixture
def undisturbed(config, tmp_path: Path) -> dict[str, bytes]:
    sample(config("undisturbed"))
    return content(tmp_path / "undisturbed")


def _sample_and_die(config: Any, target: str, call: int, when: str) -> int:
    with at_call(target, call, when, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        return int(sample(config) is None)


def _sample_and_die_soon(config: Any, delay_s: float) -> int:
    run = compose_sampling(config)
    threading.Timer(delay_s, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    asyncio.run(run.sample())
    return 0


MOMENTS = {
    "before the first group": ("whet.sample.journal.Journal.write", 1, "before"),
    "after a group": ("whet.sample.journal.Journal.write", 6, "after"),
    "between two steps": ("whet.sample.journal.Journal.write", 4, "after"),
    "after the last group": ("whet.sample.journal.Journal.write", NUM_PROMPTS, "after"),
    "while it samples": ("whet.engines.local.engine.LocalEngine._step", 10, "after"),
    "while the rows are written": ("whet.sample.run.rows_of", 6, "before"),
    "before the rows take their place": ("whet.sample.run.os.fsync", 1, "before"),
    "between rows and report": ("whet.sample.run.write_lines", 2, "before"),
    "before the picture": ("whet.sample.run.draw", 1, "before"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(config, undisturbed, tmp_path: Path, moment: str):
    assert in_process(_sample_and_die, config(), *MOMENTS[moment])[0] == -signal.SIGKILL
    left = [name for name in FILES if (tmp_path / "out" / name).exists()]
    assert all((tmp_path / "out" / name).read_bytes() == undisturbed[name] for name in left)  # whole, or not there
    report = sample(config())
    assert report and report["prompts"] == NUM_PROMPTS
    assert content(tmp_path / "out") == undisturbed


def test_a_run_may_be_killed_five_times_at_any_moment(tmp_path: Path, shared_data: Path):
    lines = (shared_data / "gsm8k_train.jsonl").open(encoding="utf-8")
    texts = [" ".join(json.loads(line).values()) for line, _ in zip(lines, range(60), strict=False)]
    model = make_tiny(tmp_path / "model", tokenizer="bpe", corpus=texts, vocab_size=512)
    settings = {
        **{"model__path": str(model), "data__train": f"{shared_data / 'gsm8k_train.jsonl'}@[0:40]"},
        **{"data__columns": {"prompt": "question", "label": "answer"}, "data__chat": "always"},
        **{"rollout__prompts_per_step": 4, "rollout__group_size": 4, "rollout__max_tokens": 16},
        **{"reward": "test_run_sample:letters", "sample__select": "pairs", "sample__keep_truncated": True},
    }
    whole, killed = (config_of("sample", tmp_path / name, **settings) for name in ("whole", "killed"))
    run = compose_sampling(whole)
    start = time.monotonic()
    asyncio.run(run.sample())
    lasts_s, moments = time.monotonic() - start, random.Random(7)
    delays = [moments.uniform(0.05, 0.3) * lasts_s for _ in range(5)]
    codes = [in_process(_sample_and_die_soon, killed, delay)[0] for delay in delays]
    # A machine that was busy before may be quick now, and a run come to its end: going on then changes nothing.
    assert set(codes) <= {0, -signal.SIGKILL} and codes[:3] == [-signal.SIGKILL] * 3
    sample(killed)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    pairs = rows_in(tmp_path / "killed")
    assert len({row["group"] for row in pairs}) == len(pairs) >= 38


def test_an_interrupted_step_is_sampled_as_a_whole_and_judged_where_it_was_not(
    config, tmp_path: Path, undisturbed, monkeypatch
):
    """Rounding depends on what is decoded together: only the same rows beside each other give the same bits."""
    assert in_process(_sample_and_die, config(), *MOMENTS["after a group"])[0] == -signal.SIGKILL
    played: list[str] = []
    original = Play.run

    async def counted(play, *arguments, **options):
        played.append(play.episode.group)
        return await original(play, *arguments, **options)

    monkeypatch.setattr(Play, "run", counted)
    seen: list[str] = []
    run = judged_by(config(), lambda episode: seen.append(episode.group) or letters(episode))
    asyncio.run(run.sample())
    assert set(played) == {f"g{i}" for i in range(4, NUM_PROMPTS)} and len(played) == 3 * 8
    assert len(seen) == 3 * (NUM_PROMPTS - 6)
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_order_and_the_same_command_goes_on(
    config, tmp_path: Path, tiny_qwen: Path, prompts: str, undisturbed, number: int, capfd
):
    flags = flags_of(
        {
            **QUIET,
            **{"model__path": str(tiny_qwen), "data__train": prompts, "reward": "test_run_sample:letters"},
            **{"rollout__prompts_per_step": 4, "rollout__group_size": 3, "rollout__max_tokens": 6},
            **{"sample__keep_truncated": True, "output_dir": str(tmp_path / "out")},
        }
    )
    with at_call("whet.sample.journal.Journal.write", 5, "after", lambda: os.kill(os.getpid(), number)):
        assert cli.main(["sample", *flags]) == 130
    out, err = capfd.readouterr()
    assert "of 12 prompts in the journal; the same command goes on from here" in out and "stopping as soon" in err
    assert not (tmp_path / "out" / "rows.jsonl").exists()
    assert cli.main(["sample", *flags]) == 0
    assert content(tmp_path / "out") == undisturbed
    assert "pass rate" in capfd.readouterr().out


def test_a_changed_setting_file_or_model_is_refused(config, tmp_path: Path, tiny_qwen: Path, prompts: str, monkeypatch):
    model = make_tiny(tmp_path / "model")
    sample(config(model__path=str(model)))
    monkeypatch.setattr("whet.sample.run.load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    changes = {
        "rollout.temperature was 1.0 and is 0.5": {"rollout__temperature": 0.5},
        "seed was 0 and is 1": {"seed": 1},
        "reward.use was": {"reward": "test_run_sample:moody"},
    }
    for said, change in changes.items():
        with pytest.raises(CheckpointError, match=said):
            sample(config(model__path=str(model), **change))
    write_rows(Path(prompts), [{"prompt": row["prompt"]} for row in sums(13)])
    with pytest.raises(CheckpointError, match=r"prompts was 12 prompts.*and is 13 prompts"):
        sample(config(model__path=str(model)))
    write_rows(Path(prompts), [{"prompt": r["prompt"], "label": r["response"]} for r in sums(12)])
    assert sample(config(model__path=str(model), engine__timeout_s=5.0, rollout__prompts_per_step=4))
    make_tiny(tmp_path / "model", seed=5)
    with pytest.raises(CheckpointError, match=r"files of model\.path was"):
        sample(config(model__path=str(model)))


# --- going on to train ------------------------------------------------------------------------------------


def then_file(tmp_path: Path, folder: Path, **settings: Any) -> str:
    lines = {"model": str(folder), "output_dir": str(tmp_path / "trained"), **settings}
    path = tmp_path / "then.yaml"
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items()))
    return str(path)


@pytest.mark.parametrize("chosen,method", [("best", "sft"), ("pairs", "dpo"), ("pairs", "reward"), ("labels", "kto")])
def test_one_command_goes_on_to_train_on_the_rows(
    tmp_path: Path, tiny_qwen: Path, prompts: str, chosen: str, method: str, capsys
):
    train = {"train": {"steps": 2, "batch_size": 4}, "log": {"progress": False, "tensorboard": False}}
    then = then_file(tmp_path, tiny_qwen, method=method, data={"cache_dir": str(tmp_path / "cache")}, **train)
    flags = {
        **{"model.path": str(tiny_qwen), "data.train": prompts, "reward": "test_run_sample:letters"},
        **{"rollout.prompts_per_step": 6, "rollout.group_size": 4, "rollout.max_tokens": 6, "log.progress": False},
        **{"sample.keep_truncated": True, "sample.select": chosen, "sample.threshold": 5.0},
        "output_dir": str(tmp_path / "out"),
    }
    assert cli.main(["sample", "--then", then, *flags_of(flags)]) == 0
    assert "the final model is in" in capsys.readouterr().out
    before, after = saved_weights(tiny_qwen), saved_weights(tmp_path / "trained")
    assert any(not after[name].equal(before[name]) for name in before)


def test_a_training_run_that_does_not_fit_is_refused_before_sampling(config, tmp_path: Path, tiny_qwen: Path):
    refused = {
        "the rows of sample.select 'best' are for sft": {"method": "dpo"},
        "a run of grpo": {"method": "grpo", "reward": "exact"},
        "optim.lrr is not a setting": {"optim": {"lrr": 1}},
        "output_dir is": {"output_dir": str(tmp_path / "out")},
        "there is no folder /nowhere/model": {"model": "/nowhere/model"},
    }
    for said, settings in refused.items():
        then = then_file(tmp_path, tiny_qwen, **settings)
        with pytest.raises(WhetError, match=said):
            compose_sampling(config(sample__then=then))
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        compose_sampling(config(sample__then=str(tmp_path / "no.yaml")))


def test_prompts_in_other_words_are_told(config, tmp_path: Path, tiny_qwen: Path, caplog):
    then = then_file(tmp_path, tiny_qwen)
    compose_sampling(config(sample__then=then))
    assert "in other words" not in caplog.text
    compose_sampling(config(sample__then=then, data__chat="always"))
    assert "data.chat 'always', but" in caplog.text and "in other words" in caplog.text


# --- what users get wrong ---------------------------------------------------------------------------------

WRONG = {
    "no reward": ({"reward": ...}, "reward is missing: sample needs one"),
    "no prompts": ({"data.train": ...}, "data.train is missing: sample needs a file of prompts to sample from"),
    "an unknown selection": ({"sample.select": "bset"}, "did you mean best?"),
    "a gap between no pairs": ({"sample.min_gap": 1}, "sample.min_gap is 1.0"),
    "many labels": ({"sample.select": "labels", "sample.keep": 2}, "sample.keep is 2"),
    "a pair of one": ({"sample.select": "pairs", "rollout.group_size": 1}, "at least two completions"),
    "a learning rate": ({"optim.lr": 1}, "optim is given, but sample has no use for it"),
    "a loss": ({"loss.use": "sft"}, "loss is given, but sample has no use for it"),
    "an environment": ({"env": "single"}, "env is given, but sample has no use for it"),
    "an evaluation": ({"data.eval": "x.jsonl"}, "data.eval is 'x.jsonl', but sample evaluates nothing"),
    "a new adapter": ({"model.adapter.rank": 4}, "sample trains nothing"),
    "several at once": ({"model.adapter.rank": 4, "optim.lr": 1, "sample.min_gap": 1}, "3 problems"),
    "optimizer steps": ({"rollout.optimizer_steps": 2}, "rollout.optimizer_steps is 2"),
    "completions beyond the positions": ({"rollout.max_tokens": 5000}, "4,096 positions"),
    "the prompts as output": ({"sample.output": "prompts.jsonl"}, "the file of the prompts"),
    "an output of another kind": ({"sample.output": "rows.csv"}, "end its name with .jsonl"),
    "an output below a file": ({"sample.output": "prompts.jsonl/rows.jsonl"}, "is no folder to put it in"),
    "a folder as output": ({"sample.output": "folder.jsonl"}, "is no folder to put it in"),
    "the model's folder as output": ({"output_dir": "model"}, "the folder of model.path"),
    "a label that is asked for": ({"reward": "exact", "data.columns": {"label": "other"}}, "'other'"),
    "an unknown engine": ({"engine.use": "vllmm"}, "vllmm"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_on_one_screen_before_a_model_is_loaded(
    case: str, tmp_path: Path, tiny_qwen: Path, prompts: str, monkeypatch, capsys
):
    changes, said = WRONG[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "model").symlink_to(tiny_qwen)
    monkeypatch.setattr("whet.sample.run.load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    base = {"model.path": "model", "data.train": "prompts.jsonl", "reward": "test_run_sample:letters"}
    given = {name: value for name, value in {**base, "output_dir": "out", **changes}.items() if value is not ...}
    assert cli.main(["sample", *flags_of(given)]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and 0 < len(err.splitlines()) <= 24
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_told(config, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("whet.sample.run.os.access", lambda path, mode: False)
    with pytest.raises(WhetError, match="not writable"):
        compose_sampling(config(sample__output=str(tmp_path / "rows.jsonl")))


def test_check_looks_at_a_sampling_run_too(tmp_path: Path, tiny_qwen: Path, prompts: str, capsys):
    flags = {"method": "sample", "model.path": str(tiny_qwen), "data.train": prompts, "output_dir": str(tmp_path / "o")}
    assert cli.main(["check", *flags_of({**flags, "reward": "exact"})]) == 0
    assert "nothing stands in the way" in capsys.readouterr().out
    assert cli.main(["check", *flags_of({**flags, "reward": "exact", "rollout.max_tokens": 5000})]) != 0
    assert "4,096 positions" in capsys.readouterr().out


def test_sampling_is_refused_to_other_methods():
    done = subprocess.run(
        [sys.executable, "-m", "whet.cli", "sft", "--model.path", "x", "--data.train", "y", "--sample.keep", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "sample is given, but sft has no use for it" in done.stderr
