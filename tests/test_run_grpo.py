"""Reinforcement learning from its configuration to the policy it leaves behind, on tiny models and toy rewards."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from metrics_page import undocumented
from runs import (
    column,
    config_of,
    killed,
    metrics,
    same_bits,
    saved_weights,
    sums,
    train,
    without_clock,
    write_rows,
)
from whet.batch import Batch
from whet.compose import Run, compose, evaluate
from whet.errors import CheckpointError, RewardError, SeveralErrors
from whet.losses import loss
from whet.types import Episode

NUM_TOKENS = 260
"""What the tiny model's vocabulary holds: a byte is an `a` by chance in one of so many."""


def share_of_a(episode: Episode) -> float:
    """How much of a response is the letter a."""
    return episode.response.count("a") / episode.num_sampled


async def slow_share_of_a(episode: Episode) -> float:
    await asyncio.sleep(0)
    return share_of_a(episode)


def moody(episode: Episode) -> float:
    """Fails for every fourth member of a group, and for one that it cannot put into a number."""
    if episode.index % 4 == 0:
        raise ValueError("not in the mood")
    return float("nan") if episode.index == 1 else share_of_a(episode)


def broken(episode: Episode) -> float:
    raise OSError("the grader is not there")


def always(episode: Episode, *, value: float = 1.0) -> float:
    return value


@loss(reads=("advantages",))
def push(out, batch, *, strength: float = 1.0):
    """Policy gradient without ratio or clipping."""
    return -strength * batch["advantages"] * out["logprobs"], {"push": batch["advantages"].abs()}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in sums(12)])


@pytest.fixture
def config(tmp_path: Path, tiny_qwen: Path, prompts: str):
    """A run of four steps, four prompts times four completions; settings of the test's own go by keyword."""

    def make(name: str = "out", **settings: Any):
        base = {
            **{"model__path": str(tiny_qwen), "data__train": prompts, "reward": "test_run_grpo:share_of_a"},
            **{"train__steps": 4, "optim__lr": 3e-3, "optim__schedule": "constant", "optim__weight_decay": 0.0},
            **{"rollout__prompts_per_step": 4, "rollout__group_size": 4, "rollout__max_tokens": 4},
        }
        return config_of(settings.pop("method", "grpo"), tmp_path / name, **{**base, **settings})

    return make


def batches_of(run: Run) -> list[Batch]:
    """The minibatches that the policy is trained on, filled in while the run goes on."""
    seen: list[Batch] = []
    policy = run.loop.policy
    original = policy.forward_backward

    def watch(batch, terms):
        seen.append(batch)
        return original(batch, terms)

    policy.forward_backward = watch  # type: ignore[method-assign]
    return seen


def logprobs_of(model: Any, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """[T] by the model's own forward, row by row; 0 on tokens that are not trained."""
    rows = []
    for tokens in batch.tokens.split(batch.lengths.tolist()):
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1].float() / temperature
        picked = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        rows.append(torch.cat([torch.zeros(1), picked]))
    return torch.cat(rows) * batch.loss_mask


# --- learning ---------------------------------------------------------------------------------------------


def test_a_toy_reward_is_learned(config, tmp_path: Path):
    train(config(train__steps=60, rollout__prompts_per_step=8, rollout__group_size=8))
    rewards = column(tmp_path / "out", "rollout/reward")
    assert rewards[0] < 0.1
    assert sum(rewards[-5:]) / 5 > 0.8


def test_a_reward_that_tells_nothing_apart_changes_nothing(config, tmp_path: Path, tiny_qwen: Path):
    train(config(reward={"use": "test_run_grpo:always", "value": 0.5}))
    assert same_bits(saved_weights(tmp_path / "out"), saved_weights(tiny_qwen))
    assert column(tmp_path / "out", "rollout/num_zero_std_groups") == [4, 4, 4, 4]


def test_an_entropy_bonus_keeps_the_policy_open(config, tmp_path: Path):
    common = {"train__steps": 25, "rollout__group_size": 8}
    train(config("without", **common))
    train(config("with", **common, entropy_coef=0.3))
    without, kept = (column(tmp_path / name, "train/entropy")[-1] for name in ("without", "with"))
    assert kept > without + 0.5
    last = metrics(tmp_path / "with", "train/entropy_bonus_loss")[-1]
    expected = last["train/ppo_clip_loss"] + 0.3 * last["train/entropy_bonus_loss"]
    assert last["train/loss"] == pytest.approx(expected, abs=1e-5)


# --- engine, trainer and reference agree ------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rollout__temperature": 0.7},
        {"rollout__temperature": 1.5, "rollout__top_k": 20, "rollout__top_p": 0.9},
        {"model__adapter": {"rank": 4}, "kl__coef": 0.1},
        {"kl__coef": 0.1},
        {"rollout__optimizer_steps": 2},
        {"data__chat": "always", "rollout__max_tokens": 12, "engine__max_concurrent": 3},
    ],
)
def test_the_first_step_is_on_policy(config, tmp_path: Path, settings):
    run = compose(config(train__steps=1, **settings))
    seen = batches_of(run)
    asyncio.run(run.train())
    (line,) = metrics(tmp_path / "out", "train/loss")
    assert 0 < line["train/train_rollout_logprob_abs_diff_max"] < 1e-4
    assert line["train/train_rollout_logprob_abs_diff"] < 1e-4
    if "rollout__optimizer_steps" not in settings:
        assert abs(line["train/ppo_kl"]) < 1e-6
    if "kl__coef" in settings:
        assert abs(line["train/kl"]) < 1e-6
    model = AutoModelForCausalLM.from_pretrained(config().model.path)
    expected = logprobs_of(model, seen[0], settings.get("rollout__temperature", 1.0))
    assert (seen[0]["sampler_logprobs"] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("adapter", [None, {"rank": 4}])
def test_the_penalty_is_towards_the_model_that_the_run_began_with(config, tiny_qwen: Path, tmp_path: Path, adapter):
    settings = {"kl__coef": 0.05, "kl__type": "k3", "optim__lr": 1e-2, "checkpoint__every_steps": 2}
    if adapter:
        settings["model__adapter"] = adapter
    first = compose(config(train__steps=2, **settings))
    asyncio.run(first.train())
    run = compose(config(**settings))  # goes on from step 2
    seen = batches_of(run)
    asyncio.run(run.train())
    reference = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    assert len(seen) == 2
    for batch in seen:
        assert (batch["ref_logprobs"] - logprobs_of(reference, batch)).abs().max() < 1e-4
    last = metrics(tmp_path / "out", "train/kl")[-1]
    assert last["train/kl"] > 1e-3  # it has moved away
    expected = last["train/ppo_clip_loss"] + 0.05 * last["train/kl_loss"]
    assert last["train/loss"] == pytest.approx(expected, abs=1e-5)


def test_the_reference_of_an_adapter_that_is_trained_on_has_the_adapter(config, tmp_path: Path):
    train(config("first", model__adapter={"rank": 4}, optim__lr=1e-2))
    folder = tmp_path / "first"
    run = compose(config("second", model__path=str(folder), kl__coef=0.1, optim__lr=1e-2))
    seen = batches_of(run)
    asyncio.run(run.train())
    kl = column(tmp_path / "second", "train/kl")
    assert abs(kl[0]) < 1e-6 < kl[-1]
    base = AutoModelForCausalLM.from_pretrained(config().model.path)
    reference = PeftModel.from_pretrained(base, folder)
    assert (seen[-1]["ref_logprobs"] - logprobs_of(reference, seen[-1])).abs().max() < 1e-4


def test_several_optimizer_steps_compare_with_the_policy_that_sampled(config, tmp_path: Path):
    run = compose(config(rollout__optimizer_steps=2, optim__lr=1e-2, reward="random"))
    seen = batches_of(run)
    asyncio.run(run.train())
    assert len(seen) == 8 and all(batch.num_units == 2 for batch in seen)
    for batch in seen:
        assert (batch["old_logprobs"] - batch["sampler_logprobs"]).abs()[batch.loss_mask].max() < 1e-4
    lines = metrics(tmp_path / "out", "train/ppo_kl")
    assert all(line["train/importance_weight_max"] > 1.01 for line in lines)  # the second half's policy has moved
    assert run.loop.progress.optimizer_steps == 8
    train(config("single", reward="random"))
    assert column(tmp_path / "single", "train/importance_weight_max") == [1.0] * 4


# --- the parts that can be chosen -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["rloo", "grpo_no_std"])
def test_credit_is_given_by_the_rule_that_was_chosen(config, rule: str):
    run = compose(config(credit=rule, train__steps=1, reward={"use": "random"}))
    seen = batches_of(run)
    asyncio.run(run.train())
    (batch,) = seen
    for unit in range(batch.num_units):
        rewards = batch["rewards"][batch.unit_ids == unit]
        mean = rewards.mean() if rule == "grpo_no_std" else (rewards.sum() - rewards) / 3
        members = torch.nonzero(batch.unit_ids == unit)[:, 0]
        firsts = [torch.nonzero((batch.sequence_ids == member) & batch.loss_mask)[0, 0] for member in members]
        assert batch["advantages"][torch.stack(firsts)].tolist() == pytest.approx((rewards - mean).tolist(), abs=1e-6)


def test_a_reward_of_ones_own_is_found_in_the_working_folder(config, tmp_path: Path, monkeypatch):
    code = "async def length(episode, *, scale=1.0):\n    return {'score': scale * episode.num_sampled, 'other': 7}\n"
    (tmp_path / "my_rewards_of_run.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    train(config(reward={"use": "my_rewards_of_run:length", "scale": 0.25}, train__steps=1))
    (line,) = metrics(tmp_path / "out", "rollout/reward")
    assert 0 < line["rollout/reward"] <= 1
    assert line["rollout/reward/length/other"] == 7


def test_sync_and_async_rewards_add_up_with_their_weights(config, tmp_path: Path):
    both = [{"use": "test_run_grpo:share_of_a"}, {"use": "test_run_grpo:slow_share_of_a", "weight": 3}]
    train(config(reward=both))
    for line in metrics(tmp_path / "out", "rollout/reward"):
        assert line["rollout/reward"] == pytest.approx(4 * line["rollout/reward/share_of_a"])
        assert line["rollout/reward/slow_share_of_a"] == line["rollout/reward/share_of_a"]


def test_episodes_whose_reward_fails_are_left_out_and_counted(config, tmp_path: Path, caplog):
    run = compose(config(reward="test_run_grpo:moody"))
    seen = batches_of(run)
    asyncio.run(run.train())
    assert column(tmp_path / "out", "rollout/num_failed") == [8, 8, 8, 8]
    assert [batch.num_sequences for batch in seen] == [8, 8, 8, 8]
    assert "not in the mood" in caplog.text
    assert run.loop.global_step == 4


def test_a_reward_that_fails_for_all_ends_the_run_with_its_reason(config):
    with pytest.raises(RewardError, match=r"all 16 episodes .* OSError: the grader is not there"):
        train(config(reward="test_run_grpo:broken"))


def test_terms_may_be_ones_own(config, tmp_path: Path):
    train(config(terms=[{"use": "test_run_grpo:push", "strength": 2.0}], train__steps=30, rollout__group_size=8))
    rewards = column(tmp_path / "out", "rollout/reward")
    assert rewards[-1] > rewards[0] + 0.3
    assert column(tmp_path / "out", "train/push")[0] > 0


# --- evaluation, repetition, resumption -------------------------------------------------------------------


def test_held_out_prompts_are_sampled_before_during_and_after(config, tmp_path: Path):
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"prompt": f"{n}-1="} for n in range(6)])
    settings = {"eval__at_start": True, "eval__every_steps": 2, "eval__num_samples": 2, "eval__max_prompts": 5}
    run = train(config(data__eval=held_out, train__steps=5, **settings))
    lines = metrics(tmp_path / "out", "eval/reward")
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert {"eval/pass@1", "eval/pass@2", "eval/mean@2", "eval/truncated_ratio"} <= lines[0].keys()
    assert run.loop.progress.last_eval["eval/reward"] == lines[-1]["eval/reward"]
    assert len(run.feed.transcripts) == 3
    # Evaluations sample what training does not: the steps between them are those of a run without any.
    train(config("plain", train__steps=5))
    assert same_bits(saved_weights(tmp_path / "out"), saved_weights(tmp_path / "plain"))


def test_several_sets_are_evaluated_at_once_each_in_its_own_way(config, tmp_path: Path):
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"prompt": f"{n}-1="} for n in range(3)])
    other = write_rows(tmp_path / "other.jsonl", [{"question": f"{n}-2=", "label": "x"} for n in range(6)])
    sets = {
        "sums": {"path": held_out, "num_samples": 4, "max_tokens": 2},
        "halves": {
            **{"path": other, "max_prompts": 2, "columns": {"prompt": "question"}, "prompt_template": "So {prompt}"},
            "reward": {"use": "test_run_grpo:always", "value": 0.5},
        },
    }
    settings = {"eval__at_start": True, "eval__num_samples": 2, "train__steps": 1, "checkpoint__best": True}
    run = compose(config(data__eval=held_out, eval__sets=sets, checkpoint__every_steps=1, **settings))
    most = 0
    engine = run.engine
    original = engine._step

    def watch(*arguments):
        nonlocal most
        most = max(most, engine.health()["active"] + engine.health()["waiting"])
        return original(*arguments)

    engine._step = watch
    asyncio.run(run.train())
    first, last = metrics(tmp_path / "out", "eval/reward")
    assert {"eval/pass@2", "eval/mean@2", "eval/sums/pass@4", "eval/sums/mean@4", "eval/halves/mean@2"} <= first.keys()
    assert first["eval/halves/reward"] == last["eval/halves/reward"] == 0.5
    assert first["eval/halves/reward/always"] == 0.5
    assert first["eval/sums/response_length_max"] <= 2 < first["eval/response_length_max"]
    assert most == 3 * 2 + 3 * 4 + 2 * 2  # all at once, so the engine waits for no set
    assert [episode.prompt.id for episode in run.feed.transcripts] == [
        *("eval/0", "eval/1", "eval/2", "sums/0", "sums/1", "sums/2", "halves/0", "halves/1")
    ]
    # The default set is sampled as it would be alone.
    alone = config("alone", data__eval=held_out, **settings, checkpoint__every_steps=1)
    train(alone)
    assert metrics(tmp_path / "alone", "eval/reward")[0].items() <= first.items()


def test_the_start_may_stay_the_best(config, tmp_path: Path, prompts: str, tiny_qwen: Path):
    settings = {"data__eval": prompts, "eval__at_start": True, "checkpoint__best": True, "train__steps": 2}
    settings |= {"reward": {"use": "test_run_grpo:always", "value": 0.5}, "kl__coef": 1.0, "optim__weight_decay": 0.5}
    run = train(config(**settings))  # where rewards are alike, weight decay alone moves the weights
    assert run.loop.progress.best_step == 0
    assert same_bits(saved_weights(tmp_path / "out"), saved_weights(tiny_qwen))


def test_sets_alone_can_be_evaluated_on_and_choose_the_best(config, tmp_path: Path, prompts: str):
    sets = {"sums": {"path": prompts, "max_prompts": 4}}
    run = train(config(eval__sets=sets, eval__every_steps=1, eval__patience=50, train__steps=2))
    assert run.loop.progress.best == max(column(tmp_path / "out", "eval/sums/reward"))
    metrics_now, _ = asyncio.run(evaluate(config(eval__sets=sets, data__train="nowhere.jsonl")))
    assert {name.split("/")[1] for name in metrics_now} == {"sums"}


def test_what_is_wrong_with_a_set_is_told_with_its_name_before_a_model_is_loaded(config, tmp_path: Path, prompts: str):
    empty = write_rows(tmp_path / "empty.jsonl", [{"answer": "1"}])
    sets = {
        "gone": {"path": str(tmp_path / "gone.jsonl")},
        "odd": {"path": empty},
        "judged": {"path": prompts, "reward": "mth"},
        "long": {"path": prompts, "max_prompt_length": 1},
        "unlabelled": {"path": prompts, "reward": "math"},
    }
    with pytest.raises(SeveralErrors) as raised:
        compose(config(eval__sets=sets))
    told = str(raised.value)
    for name in sets:
        assert f"eval.sets.{name}: " in told, f"{name} in {told}"
    assert "did you mean math?" in told


def test_every_metric_of_a_run_stands_on_the_page_about_them(config, tmp_path: Path, prompts: str):
    settings = {"data__eval": prompts, "eval__num_samples": 2, "eval__at_start": True, "train__steps": 2}
    both = [{"use": "test_run_grpo:share_of_a"}, {"use": "test_run_grpo:slow_share_of_a"}]
    train(config(reward=both, kl__coef=0.1, entropy_coef=0.01, rollout__optimizer_steps=2, **settings))
    train(config("ahead", rollout__mode="async", rollout__filter="nonzero_std", **settings))
    correction = {"correction__use": "tis", "correction__opsm": 0.1, "correction__veto": 1e-4}
    rows = write_rows(tmp_path / "rows.jsonl", sums(4))
    train(config("critic", method="ppo", kl__coef=0.1, mix__data=rows, train__steps=1, **correction))
    folders = ("out", "ahead", "critic")
    names = {name for folder in folders for line in metrics(tmp_path / folder) for name in line}
    assert undocumented(names - {"step"}) == set()
    wanted = "prefix_hit_rate zero_std_share staleness_max repetition_fraction truncated_ratio reward_std"
    assert {f"rollout/{name}" for name in wanted.split()} <= names
    assert {"train/pg_loss", "train/kl", "perf/tflops", "perf/publish_s", "perf/longest_sample_tokens_per_s"} <= names
    assert "perf/mfu" not in names  # nobody says what a CPU can reach
    shared = column(tmp_path / "out", "rollout/prefix_hit_rate")
    assert all(0.5 < share < 1 for share in shared)  # three of the four members of a group look at a prompt once more


def test_the_same_seed_gives_the_same_run_and_another_does_not(config, tmp_path: Path):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        train(config(name, seed=seed))
    assert without_clock(metrics(tmp_path / "one")) == without_clock(metrics(tmp_path / "two"))
    assert same_bits(saved_weights(tmp_path / "one"), saved_weights(tmp_path / "two"))
    assert column(tmp_path / "one", "rollout/reward") != column(tmp_path / "other", "rollout/reward")


def test_what_is_sampled_does_not_depend_on_how_many_are_decoded_at_a_time(config, tmp_path: Path):
    for name, concurrent in (("wide", 64), ("narrow", 3)):
        train(config(name, engine__max_concurrent=concurrent, train__steps=1))
    assert column(tmp_path / "wide", "rollout/reward") == column(tmp_path / "narrow", "rollout/reward")


def test_the_folder_of_another_method_is_refused(config, tmp_path: Path, tiny_qwen: Path):
    rows = write_rows(tmp_path / "rows.jsonl", sums(8))
    sft = {"model__path": str(tiny_qwen), "data__train": rows, "train__steps": 1, "checkpoint__every_steps": 1}
    train(config_of("sft", tmp_path / "out", **sft))
    with pytest.raises(CheckpointError, match=r"checkpoint-1 was made by sft, and this is a run of grpo"):
        compose(config())
    train(config("next", model__path=str(tmp_path / "out" / "checkpoint-1"), train__steps=1))


KILLS = {
    "while it samples": ("whet.engines.local.engine.LocalEngine._step", 10, "before"),
    "between two optimizer steps": ("whet.backends.local.LocalBackend.optim_step", 7, "after"),
    "half of the checkpoint written": ("whet.keeper.save_rng", 2, "before"),
    "saved, before the next rollout": ("whet.keeper.Keeper.save", 1, "after"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_qwen: Path) -> tuple[Callable, dict, list]:
    """A run that nothing happened to: what makes its configuration anew, its weights and metrics."""
    folder = tmp_path_factory.mktemp("undisturbed")
    rows = write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in sums(7)])

    def make(output: Path):
        return config_of(
            "grpo",
            output,
            **{"model__path": str(tiny_qwen), "data__train": rows, "reward": "test_run_grpo:share_of_a"},
            **{"model__adapter": {"rank": 4}, "kl__coef": 0.05, "optim__lr": 3e-3, "train__steps": 5},
            **{"rollout__prompts_per_step": 4, "rollout__group_size": 4, "rollout__max_tokens": 4},
            **{"rollout__optimizer_steps": 2, "checkpoint__every_steps": 2, "data__eval": rows},
            **{"eval__every_steps": 2, "eval__temperature": 0.5},
        )

    train(make(folder / "out"))
    return make, saved_weights(folder / "out"), without_clock(metrics(folder / "out"))


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(undisturbed, tmp_path: Path, moment: str):
    make, weights, lines = undisturbed
    assert killed(make(tmp_path / "out"), *KILLS[moment]) == -signal.SIGKILL
    train(make(tmp_path / "out"))
    assert same_bits(saved_weights(tmp_path / "out"), weights)
    assert without_clock(metrics(tmp_path / "out")) == lines
