"""Rollouts written down, sampled without training, and trained on once more: the same weights, to the bit."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from runs import config_of, metrics, same_bits, saved_weights, sums, train, without_clock, write_rows
from whet.compose import compose
from whet.errors import CheckpointError, ConfigError, DataError
from whet.models.tiny import make_tiny
from whet.rollout.dump import read_lines
from whet.types import Episode


def share_of_a(episode: Episode) -> float:
    """Of a response; every seventh answer cannot be judged."""
    if episode.group.endswith("1") and episode.index == 1:
        raise ValueError("not in the mood")
    return episode.response.count("a") / 3 + 0.1 * episode.index


def length(episode: Episode) -> float:
    return float(len(episode.response))


@pytest.fixture
def config(tmp_path: Path, tiny_qwen: Path):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"], "label": 7} for row in sums(12)])

    def make(name: str = "out", **settings: Any):
        base = {
            **{"model__path": str(tiny_qwen), "data__train": prompts, "reward": "test_run_replay:share_of_a"},
            **{"train__steps": 4, "optim__lr": 3e-3, "optim__schedule": "linear"},
            **{"rollout__prompts_per_step": 4, "rollout__group_size": 4, "rollout__max_tokens": 4},
            **{"rollout__optimizer_steps": 2, "kl__coef": 0.05},
        }
        given = {name: value for name, value in {**base, **settings}.items() if value is not ...}
        return config_of(given.pop("method", "grpo"), tmp_path / name, **given)

    return make


def same_metrics(ours: Path, theirs: Path) -> bool:
    """Whether a replay logs what the run did, but for its speed and how its groups came to be sampled."""
    replayed, sampled = without_clock(metrics(ours)), without_clock(metrics(theirs))
    left_out = {name for one, other in zip(replayed, sampled, strict=True) for name in other.keys() - one.keys()}
    assert left_out <= {"rollout/num_fetches", "rollout/num_left_over", "rollout/prefix_hit_rate"}, left_out
    return replayed == [{name: line[name] for name in line.keys() - left_out} for line in sampled]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_training_on_what_was_written_down_gives_the_same_weights_to_the_bit(config, tmp_path: Path, kind: str):
    train(config(log__rollouts=kind))
    files = sorted(path.name for path in (tmp_path / "out" / "rollouts").iterdir())
    assert files == ["run.json", *(f"step-{step}.{kind}" for step in (1, 2, 3, 4))]
    # Neither prompts nor a reward are there any more.
    folder = str(tmp_path / "out")
    run = compose(config("again", debug__train_only=folder, data__train=..., reward=...))
    assert run.engine is None
    asyncio.run(run.train())
    assert run.loop.global_step == 4
    assert same_bits(saved_weights(tmp_path / "again"), saved_weights(tmp_path / "out"))
    assert same_metrics(tmp_path / "again", tmp_path / "out")


OTHERS = {
    "asynchronous": {"rollout__mode": "async", "rollout__max_staleness": 4},
    "left over, masked": {
        **{"rollout__partial": True, "rollout__oversampling": 6, "rollout__mask_offpolicy": True},
        **{"rollout__sample_filter": "test_run_replay:without_the_third"},
    },
    "with a baseline": {"method": "remax", "rollout__optimizer_steps": 1},
    "with a critic": {"method": "ppo", "rollout__num_ppo_epochs": 2, "rollout__group_size": 2},
}


def without_the_third(args, groups):
    """Leaves the third member of each group out of training."""
    for group in groups:
        group[-1].remove_sample = True


@pytest.mark.parametrize("kind", OTHERS)
def test_however_it_was_sampled_it_trains_to_the_same_weights(config, tmp_path: Path, kind: str):
    settings = {"train__steps": 3, "reward": "test_run_replay:length", **OTHERS[kind]}
    train(config(log__rollouts=True, **settings))
    train(config("again", debug__train_only=str(tmp_path / "out"), **settings))
    assert same_bits(saved_weights(tmp_path / "again"), saved_weights(tmp_path / "out"))
    # Without training, too, the first step is what it was.
    sampled = train(config("sampled", debug__rollout_only=True, **settings))
    assert sampled.loop.global_step == 3 and set(sampled.policy.backends) == {"policy"}


def test_a_line_tells_all_of_an_episode(config, tmp_path: Path):
    train(config(log__rollouts=True, train__steps=1, rollout__prompts_per_step=2))
    (path,) = (tmp_path / "out" / "rollouts").glob("step-*")
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(line["group"], line["index"]) for line in lines if line["trained"]] == [
        *(("g0", index) for index in (0, 1, 2, 3)),
        *(("g1", index) for index in (0, 2, 3)),
    ]
    (failed,) = [line for line in lines if not line["trained"]]
    assert (failed["group"], failed["index"], failed["status"], failed["reward"]) == ("g1", 1, "failed", None)
    assert "not in the mood" in failed["error"]
    for line in lines:
        prompt = line["num_prompt_tokens"]
        assert line["content"] and line["label"] == 7 and line["prompt_id"].startswith("train/")
        assert len(line["tokens"]) == len(line["loss_mask"]) == len(line["sampler_logprobs"]) > prompt
        assert line["loss_mask"] == [0] * prompt + [1] * (len(line["tokens"]) - prompt)
        assert all(value < 0 for value in line["sampler_logprobs"][prompt:])
        assert line["versions"] == [{"version": 0, "start": prompt, "end": len(line["tokens"])}]
    assert math.isclose(
        sum(line["reward"] for line in lines if line["trained"]) / 7, metrics(tmp_path / "out")[0]["rollout/reward"]
    )


def test_sampling_alone_writes_what_the_first_step_of_a_run_samples(config, tmp_path: Path, tiny_qwen: Path):
    run = train(config("sampled", debug__rollout_only=True, train__steps=2))
    train(config(log__rollouts=True, train__steps=1))
    first = "rollouts/step-1.jsonl"
    assert (tmp_path / "sampled" / first).read_bytes() == (tmp_path / "out" / first).read_bytes()
    assert not list((tmp_path / "sampled").glob("*.safetensors")) and "reference" not in run.policy.backends
    assert [line["step"] for line in metrics(tmp_path / "sampled", "rollout/reward")] == [1, 2]
    assert not any("loss" in name for line in metrics(tmp_path / "sampled") for name in line)
    # It can be trained on, in a run of its own.
    train(config("trained", debug__train_only=str(tmp_path / "sampled" / "rollouts"), train__steps=2))
    assert not same_bits(saved_weights(tmp_path / "trained"), saved_weights(tiny_qwen))


def test_a_replay_goes_as_far_as_there_are_steps_at_the_rate_of_the_run(config, tmp_path: Path):
    train(config(log__rollouts=True, checkpoint__every_steps=1))
    (tmp_path / "out" / "rollouts" / "step-4.jsonl").unlink()
    run = train(config("again", debug__train_only=str(tmp_path / "out")))
    assert run.loop.global_step == 3
    assert same_bits(saved_weights(tmp_path / "again"), saved_weights(tmp_path / "out" / "checkpoint-3"))


def test_a_replay_evaluates_and_resumes(config, tmp_path: Path):
    settings = {"data__eval": str(tmp_path / "prompts.jsonl"), "eval__every_steps": 2, "checkpoint__every_steps": 2}
    train(config(log__rollouts=True, **settings))
    folder = str(tmp_path / "out")
    halfway = compose(config("again", debug__train_only=folder, **settings))
    halfway.loop.callbacks.append(lambda loop: loop.request_stop() if loop.global_step == 2 else None)
    asyncio.run(halfway.train())
    train(config("again", debug__train_only=folder, **settings))
    assert same_bits(saved_weights(tmp_path / "again"), saved_weights(tmp_path / "out"))
    assert same_metrics(tmp_path / "again", tmp_path / "out")
    with pytest.raises(CheckpointError, match="was not made by replaying"):
        compose(config(debug__train_only=folder))


def test_a_resumed_run_goes_on_with_the_numbers_of_its_rollouts(config, tmp_path: Path):
    settings = {"log__rollouts": True, "checkpoint__every_steps": 2}
    train(config("whole", **settings))
    run = compose(config(**settings))
    run.loop.callbacks.append(lambda loop: loop.request_stop() if loop.global_step == 3 else None)
    asyncio.run(run.train())
    # As if it had been killed in step 3 after the checkpoint of step 2.
    for path in (tmp_path / "out").glob("checkpoint-3/*"):
        path.unlink()
    (tmp_path / "out" / "checkpoint-3").rmdir()
    train(config(**settings))
    for step in (1, 2, 3, 4):
        name = f"rollouts/step-{step}.jsonl"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_only_the_newest_rollouts_are_kept_if_asked(config, tmp_path: Path):
    train(config(log__rollouts=True, log__keep_rollouts=2))
    assert sorted(path.name for path in (tmp_path / "out" / "rollouts").glob("step-*")) == [
        "step-3.jsonl",
        "step-4.jsonl",
    ]
    with pytest.raises(DataError, match=r"step 1 is missing.*without log\.keep_rollouts"):
        compose(config("again", debug__train_only=str(tmp_path / "out")))


def test_what_cannot_be_replayed_is_refused_before_a_model_is_loaded(config, tmp_path: Path):
    with pytest.raises(DataError, match=r"where no run has left rollouts"):
        compose(config("again", debug__train_only=str(tmp_path)))
    train(config(log__rollouts=True, train__steps=1))
    with pytest.raises(DataError, match=r"did not sample the baseline_rewards that credit 'remax' reads"):
        compose(config("again", method="remax", debug__train_only=str(tmp_path / "out")))
    first = tmp_path / "out" / "rollouts" / "step-1.jsonl"
    lines = first.read_text().splitlines()
    first.write_text("\n".join([lines[0], lines[1][:50]]))
    with pytest.raises(DataError, match=r"step-1\.jsonl:2 is no line of a rollout"):
        compose(config("again", debug__train_only=str(tmp_path / "out")))
    first.write_text(json.dumps({"group": "g0"}) + "\n")
    with pytest.raises(DataError, match=r"step-1\.jsonl: line 1 has no index, trained"):
        compose(config("again", debug__train_only=str(tmp_path / "out")))


def test_what_does_not_go_with_half_a_run_is_told(config):
    for settings, told in (
        ({"debug__rollout_only": True, "debug__train_only": "x"}, "keep one of the two"),
        ({"debug__train_only": "x", "log__rollouts": True}, "nothing is sampled"),
        ({"debug__train_only": "x", "data__eval_share": 0.5}, "the prompts are not read"),
        ({"log__keep_rollouts": 2}, "no rollouts are written"),
    ):
        with pytest.raises(ConfigError, match=told):
            config(**settings)


def test_text_of_any_kind_comes_back_from_a_line(config, tmp_path: Path, tiny_qwen: Path):
    odd = "a\u2028b\u0085c \"quoted\" \\ 漢 {'x'}\n"
    prompts = write_rows(tmp_path / "odd.jsonl", [{"prompt": odd, "label": {"a": [1, None]}}])
    train(
        config(
            data__train=prompts,
            log__rollouts=True,
            train__steps=1,
            rollout__prompts_per_step=1,
            rollout__optimizer_steps=1,
        )
    )
    lines = read_lines(tmp_path / "out" / "rollouts" / "step-1.jsonl")
    assert {line["content"] for line in lines} == {odd}
    assert lines[0]["label"] == {"a": [1, None]}


def test_ids_of_another_tokenizer_are_refused(config, tmp_path: Path):
    train(config(log__rollouts="jsonl", train__steps=1))
    other = make_tiny(tmp_path / "bpe", tokenizer="bpe", corpus=["1+1=2, 3+4=7 and so on"] * 20)
    with pytest.raises(DataError, match="whose run had another tokenizer"):
        compose(config("again", debug__train_only=str(tmp_path / "out"), model__path=str(other)))
