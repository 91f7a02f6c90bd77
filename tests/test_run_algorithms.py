"""Every method of reinforcement learning from its configuration to its weights, on a tiny model: a few steps each."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from runs import column, config_of, metrics, same_bits, saved_weights, sums, train, without_clock, write_rows
from whet.batch import Batch
from whet.cli import METHODS as COMMANDS
from whet.compose import compose
from whet.config.algorithm import METHOD_DEFAULTS
from whet.config.algorithm_rules import CREDIT_OF, REINFORCES
from whet.config.loader import dump
from whet.errors import ConfigError, DataError
from whet.methods import METHODS
from whet.types import Episode

WITHOUT_GROUPS = tuple(method for method in REINFORCES if "rollout.group_size" in METHOD_DEFAULTS.get(method, {}))


def share_of_a(episode: Episode) -> float:
    return episode.response.count("a") / episode.num_sampled


def doubled(rewards: torch.Tensor, batch: Batch) -> torch.Tensor:
    return 2 * rewards


def too_few(rewards: torch.Tensor, batch: Batch) -> torch.Tensor:
    return rewards[1:]


@pytest.fixture
def config(tmp_path: Path, tiny_qwen: Path):
    """A run of two steps, four prompts times four completions (16 of one each without groups)."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in sums(12)])

    def make(method: str, name: str = "out", **settings: Any):
        base = {
            **{"model__path": str(tiny_qwen), "data__train": prompts, "reward": "test_run_algorithms:share_of_a"},
            **{"train__steps": 2, "optim__lr": 3e-3, "optim__schedule": "constant", "rollout__max_tokens": 4},
            "rollout__prompts_per_step": 12 if method in WITHOUT_GROUPS else 4,
        }
        if method not in WITHOUT_GROUPS:
            base["rollout__group_size"] = 4
        if method == "opd":
            base["distill__teacher"] = str(tiny_qwen)
        return config_of(method, tmp_path / name, **{**base, **settings})

    return make


# --- every method -----------------------------------------------------------------------------------------


def test_every_method_is_a_command_with_rules_of_its_own():
    prompts = {name for name, method in METHODS.items() if method.task == "prompts"}
    assert set(REINFORCES) == prompts == set(CREDIT_OF) and prompts <= set(COMMANDS)


@pytest.mark.parametrize("method", REINFORCES)
def test_every_method_trains_and_does_not_depend_on_micro_batches(method: str, config, tmp_path: Path, tiny_qwen):
    kl = {} if method == "opd" else {"kl__coef": 0.05}
    for name, size in (("whole", 64), ("cut", 1)):
        steps = {"train__steps": 1, "rollout__optimizer_steps": 2, "rollout__num_ppo_epochs": 1}
        train(config(method, name, backend__micro_batch_size=size, **steps, **kl))
    whole, cut = saved_weights(tmp_path / "whole"), saved_weights(tmp_path / "cut")
    assert all(torch.allclose(whole[name], cut[name], atol=2e-5) for name in whole)
    if method != "opd":  # whose teacher is the policy itself
        assert not same_bits(whole, saved_weights(tiny_qwen))
    assert len(metrics(tmp_path / "whole", "train/loss", "train/ppo_kl")) == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole")


def test_settings_of_a_method_are_shown_and_give_way_to_what_is_written(config):
    assert config("ppo").rollout.num_ppo_epochs == 4
    assert "num_ppo_epochs: 4" in dump(config("ppo"))
    assert config("ppo", rollout__num_ppo_epochs=1).rollout.num_ppo_epochs == 1
    assert config("dapo").shaping.overlong_buffer == 0.2
    assert config("dapo", shaping__overlong_buffer=None).shaping.overlong_buffer is None
    assert config("rloo", kl__coef=0.1).kl.where == "reward"
    assert config("dapo").rollout.filter.use == "nonzero_std"
    assert config("dapo", rollout__filter=None).rollout.filter is None
    assert all(METHODS[name].defaults == settings for name, settings in METHOD_DEFAULTS.items())


# --- PPO --------------------------------------------------------------------------------------------------


def test_ppo_trains_policy_and_critic_as_often_as_it_is_told(config, tmp_path: Path):
    run = train(config("ppo", rollout__optimizer_steps=3, rollout__num_ppo_epochs=2, critic__lr=1e-3))
    assert run.loop.progress.optimizer_steps == 2 * 3 * 2
    last = metrics(tmp_path / "out", "train/critic_loss")[-1]
    assert last["train/critic_learning_rate"] == 1e-3 and last["train/learning_rate"] == pytest.approx(3e-3)
    assert last["train/critic_grad_norm"] > 0 and last["train/grad_norm"] > 0
    assert 0 <= last["train/critic_value_clip_fraction"] <= 1


def test_a_critic_that_warms_up_leaves_the_policy_alone(config, tmp_path: Path, tiny_qwen: Path):
    run = train(config("ppo", critic__warmup_steps=2))
    assert same_bits(saved_weights(tmp_path / "out"), saved_weights(tiny_qwen))
    assert column(tmp_path / "out", "train/loss") == []
    errors = column(tmp_path / "out", "train/critic_value_error")
    assert errors[1] < errors[0]
    assert run.loop.progress.optimizer_steps == 8


@pytest.mark.parametrize("shared", [False, True])
def test_the_exported_policy_is_a_plain_model_with_the_critic_in_a_folder_of_its_own(
    shared: bool, config, tmp_path: Path, tiny_qwen: Path
):
    train(config("ppo", critic__shared=shared))
    assert saved_weights(tmp_path / "out").keys() == saved_weights(tiny_qwen).keys()
    files = {path.name for path in (tmp_path / "out" / "critic").iterdir()}
    assert ("value_head.safetensors" if shared else "model.safetensors") in files
    value = "train/value_loss" if shared else "train/critic_loss"
    assert len(column(tmp_path / "out", value)) == 2


def test_a_reward_model_may_be_the_critic(config, tmp_path: Path):
    train(config("ppo", "first"))
    run = compose(config("ppo", critic__path=str(tmp_path / "first" / "critic")))
    saved = saved_weights(tmp_path / "first" / "critic")["score.weight"]
    assert run.policy.backends["critic"].model.score.weight.equal(saved)


@pytest.mark.parametrize("shared", [False, True])
def test_policy_and_critic_may_both_be_adapters(shared: bool, config, tmp_path: Path):
    settings = {"model__adapter": {"rank": 2}, "critic__shared": shared, "rollout__num_ppo_epochs": 1}
    train(config("ppo", **settings, checkpoint__every_steps=1, train__steps=1))
    files = {path.name for path in (tmp_path / "out" / "critic").iterdir()}
    assert ("value_head.safetensors" if shared else "adapter_model.safetensors") in files
    assert saved_weights(tmp_path / "out")
    train(config("ppo", **settings, checkpoint__every_steps=1, train__steps=2))
    assert len(metrics(tmp_path / "out", "train/value_loss" if shared else "train/critic_loss")) == 2


def test_gae_by_another_method_makes_a_critic_too(config, tmp_path: Path):
    train(config("grpo", credit={"use": "gae", "lam": 0.9}))
    assert len(column(tmp_path / "out", "train/critic_loss")) == 2


@pytest.mark.parametrize("shared", [False, True])
def test_a_resumed_ppo_goes_on_to_the_bit(shared: bool, config, tmp_path: Path):
    settings = {"checkpoint__every_steps": 2, "rollout__optimizer_steps": 2, "kl__coef": 0.05}
    settings |= {"critic__shared": shared} if shared else {"critic__warmup_steps": 1}
    train(config("ppo", "whole", **settings, train__steps=3))
    for steps in (2, 3):
        train(config("ppo", **settings, train__steps=steps))
    for folder in (Path(), Path("critic")):
        if not (shared and folder.name):
            ours, theirs = (saved_weights(tmp_path / name / folder) for name in ("out", "whole"))
            assert same_bits(ours, theirs)
    assert without_clock(metrics(tmp_path / "out")) == without_clock(metrics(tmp_path / "whole"))


# --- rewards, corrections, teachers, mixtures -------------------------------------------------------------


def test_a_users_transform_scale_and_clip_shape_the_reward_in_this_order(config):
    settings = {"shaping__transform": "test_run_algorithms:doubled", "shaping__scale": 3.0, "shaping__clip": 2.0}
    run = compose(config("grpo", **settings))
    (shaping,) = run.policy.method.annotate
    batch = _batch_of_rewards(0.5, -1.0, 0.1)
    assert shaping(batch, {}, {})["rewards"].tolist() == pytest.approx([2, -2, 0.6])
    with pytest.raises(DataError, match=r"shaping.transform: too_few gave \[2\] for 3 rewards"):
        stage = compose(config("grpo", shaping__transform="test_run_algorithms:too_few")).policy.method.annotate[0]
        stage(batch, {}, {})


def _batch_of_rewards(*rewards: float) -> Batch:
    from whet.batch import collate
    from whet.types import Sample, Unit

    return collate([Unit(str(i), (Sample([1, 2], [False, True], None, r),)) for i, r in enumerate(rewards)])


def test_a_correction_is_reported_and_changes_nothing_where_both_sides_agree(config, tmp_path: Path):
    train(config("grpo", "plain"))
    train(config("grpo", "tis", correction={"use": "tis", "veto": 1e-4, "opsm": 0.1}))
    # Adam makes much of little at the start, so gradients are compared and not weights.
    one, other = (column(tmp_path / name, "train/grad_norm")[0] for name in ("plain", "tis"))
    assert one == pytest.approx(other, rel=1e-4) and one > 0
    last = metrics(tmp_path / "tis", "train/correction_weight")[-1]
    assert last["train/correction_weight"] == pytest.approx(1, abs=1e-4)
    assert last["train/correction_clipped"] == last["train/correction_vetoed"] == last["train/opsm_dropped"] == 0


def test_a_policy_comes_nearer_to_its_teacher(config, tmp_path: Path, tiny_qwen: Path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": row["prompt"], "response": "aaaa"} for row in sums(12)])
    sft = {"model__path": str(tiny_qwen), "data__train": rows, "train__steps": 12, "optim__lr": 3e-3}
    train(config_of("sft", tmp_path / "teacher", **sft))
    settings = {"distill__teacher": str(tmp_path / "teacher"), "shaping__whiten": True, "train__steps": 15}
    train(config("opd", **settings, rollout__group_size=16, reward=None))
    gaps = column(tmp_path / "out", "train/teacher_kl")
    assert sum(gaps[-3:]) < 0.7 * sum(gaps[:3])


def test_opd_needs_no_reward(config, tmp_path: Path):
    settings = config("opd").model_dump()
    assert settings["reward"] is not None
    without = config("opd", reward=None)
    train(without)
    assert column(tmp_path / "out", "rollout/reward") == [0, 0]


def test_rows_beside_the_rollouts_are_learned_with_weights_of_their_own(config, tmp_path: Path, tiny_qwen: Path):
    rows = write_rows(tmp_path / "rows.jsonl", sums(7))
    mix = {"mix__data": rows, "mix__coef": 0.5, "mix__batch_size": 3}
    constant = {"reward": {"use": "test_run_grpo:always", "value": 0.5}}
    # With rewards that tell nothing apart only the rows are learned, at temperature 1 whatever the rollouts have.
    for name, temperature in (("warm", 1.7), ("plain", 1.0)):
        train(config("grpo", name, **mix, **constant, rollout__temperature=temperature, train__steps=3))
    assert same_bits(saved_weights(tmp_path / "warm"), saved_weights(tmp_path / "plain"))
    losses = column(tmp_path / "plain", "train/sft_loss")
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert column(tmp_path / "plain", "train/loss") == pytest.approx([0.5 * loss for loss in losses], rel=1e-6)
    sft = {"model__path": str(tiny_qwen), "data__train": rows, "train__batch_size": 3, "train__steps": 3}
    train(config_of("sft", tmp_path / "sft", **sft, optim__lr=3e-3, optim__schedule="constant"))
    # AdamW takes no notice of a factor of the whole gradient, but for its epsilon.
    one, other = (saved_weights(tmp_path / name) for name in ("plain", "sft"))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    assert losses == pytest.approx(column(tmp_path / "sft", "loss"), rel=1e-3)


def test_the_rows_of_a_mixture_go_on_where_they_were(config, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", sums(7))
    settings = {"mix__data": rows, "mix__batch_size": 3, "checkpoint__every_steps": 2}
    train(config("grpo", "whole", **settings, train__steps=4))
    for steps in (2, 4):
        train(config("grpo", **settings, train__steps=steps))
    assert same_bits(saved_weights(tmp_path / "out"), saved_weights(tmp_path / "whole"))
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "loop.json").read_text())
    assert (state["mix"]["epoch"], state["mix"]["position"]) == (1, 3)  # 3 + 3 + 1, then 3


def test_a_penalty_in_the_reward_holds_the_policy_near_the_reference(config, tmp_path: Path):
    common = {"train__steps": 20, "kl__where": "reward", "rollout__group_size": 8}
    for name, coef in (("loose", 1e-6), ("tight", 0.5)):
        train(config("grpo", name, kl__coef=coef, **common))
    loose, tight = (column(tmp_path / name, "train/kl") for name in ("loose", "tight"))
    assert loose[0] == tight[0] == pytest.approx(0, abs=1e-6)
    assert tight[-1] < 0.5 * loose[-1]
    assert len(column(tmp_path / "tight", "train/kl_penalty")) == 20


# --- sanity -----------------------------------------------------------------------------------------------


def test_a_sound_start_says_nothing_and_an_adapter_other_than_zero_does(config, tmp_path: Path, caplog):
    with caplog.at_level(logging.WARNING):
        train(config("grpo", "sound", rollout__optimizer_steps=2, kl__coef=0.1, model__adapter={"rank": 2}))
    assert "before the first update" not in caplog.text
    first = metrics(tmp_path / "sound", "train/kl")[0]
    assert first["train/kl"] >= 0


def test_a_policy_that_has_moved_before_the_first_update_is_told(config, monkeypatch, caplog):
    run = compose(config("grpo", rollout__optimizer_steps=2, kl__coef=0.1, train__steps=1))
    prepare = run.loop.prepare

    def moved(batch: Batch) -> Batch:
        batch = prepare(batch)
        return batch.with_columns(
            old_logprobs=batch["old_logprobs"] + 0.01 * batch.loss_mask, ref_logprobs=batch["ref_logprobs"] - 0.1
        )

    monkeypatch.setattr(run.loop, "prepare", moved)
    import asyncio

    asyncio.run(run.train())
    assert "ppo_kl is 0.01, expected below 1e-06. Does the model have dropout" in caplog.text
    assert "already differs from the reference: kl is" in caplog.text


# --- what does not go together ----------------------------------------------------------------------------

REFUSED = {
    "k1 in the loss": ("grpo", {"kl__type": "k1"}, "kl.type is 'k1'"),
    "an unbiased penalty in the reward": (
        "ppo",
        {"kl__unbiased": True},
        "kl.unbiased is true, but kl.where is 'reward'",
    ),
    "a critic that nothing asks": (
        "grpo",
        {"critic__lr": 1e-5},
        "critic.lr is given, but credit 'grpo' asks no critic",
    ),
    "a shared critic with its own rate": (
        "ppo",
        {"critic__lr": 1e-5, "critic__shared": True},
        "critic.lr is 1e-05, but critic.shared is true",
    ),
    "a factor of a critic of its own": ("ppo", {"critic__coef": 0.5}, "critic.coef is 0.5, but a critic of its own"),
    "a teacher that nothing asks": ("grpo", {"distill__teacher": "t"}, "distill.teacher is given, but credit 'grpo'"),
    "no teacher": ("opd", {"distill__teacher": None}, "distill.teacher is missing: credit 'opd' asks a teacher"),
    "limits without a correction": ("grpo", {"correction__high": 3.0}, "correction.high is given, but correction.use"),
    "limits that cross": ("grpo", {"correction": {"use": "mis", "low": 3.0}}, "correction.low is 3, above"),
    "icepop of sequences": ("grpo", {"correction": {"use": "icepop", "level": "sequence"}}, "'icepop' is about tokens"),
    "a mixture without rows": ("grpo", {"mix__coef": 0.5}, "mix.coef is given, but mix.data names no rows"),
    "a buffer longer than a completion": (
        "grpo",
        {"shaping__overlong_buffer": 9},
        "shaping.overlong_buffer is 9, more",
    ),
    "no credit": ("grpo", {"credit": []}, "credit is an empty list"),
    "one completion to compare": ("gspo", {"rollout__group_size": 1}, "rollout.group_size is 1, but credit 'grpo'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_read(name: str, config):
    method, settings, says = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        config(method, **settings)
    assert says in str(error.value)


def test_two_rules_that_begin_from_rewards_are_refused(config):
    with pytest.raises(ConfigError, match="'rloo' begins from the rewards and would leave nothing of what 'grpo' made"):
        compose(config("grpo", credit=[{"use": "grpo"}, {"use": "rloo"}]))
