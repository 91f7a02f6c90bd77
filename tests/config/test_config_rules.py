"""Rules between settings: each is broken once, names its settings, and lets the neighbouring value pass."""

from __future__ import annotations

from typing import Any

import pytest

from whet.config.algorithm_rules import GROUP_CREDITS
from whet.config.evaluation_rules import metric_mode
from whet.config.loader import from_values
from whet.config.rules import TRAINS
from whet.credit import CREDITS
from whet.errors import ConfigError
from whet.methods import METHODS

SFT = {"method": "sft", "model": "tiny", "data.train": "rows.jsonl"}
GRPO = {**SFT, "method": "grpo", "reward": "math"}


def error_of(base: dict[str, Any], **changes: object) -> str:
    values = {**base, **{name.replace("__", "."): value for name, value in changes.items()}}
    with pytest.raises(ConfigError) as raised:
        from_values({name: value for name, value in values.items() if value is not None})
    return str(raised.value)


BROKEN = {
    "an unknown method": (SFT, {"method": "grop"}, "method is 'grop'", "did you mean grpo?"),
    "nothing to train on": (SFT, {"data.train": None}, "data.train is missing", "sft needs a file"),
    "an empty list to train on": (SFT, {"data.train": []}, "data.train is missing", "sft needs a file"),
    "no reward": (GRPO, {"reward": None}, "reward is missing", "grpo needs one"),
    "an empty list of rewards": (GRPO, {"reward": []}, "reward is missing", "grpo needs one"),
    "an empty list of terms": (SFT, {"terms": []}, "terms is an empty list", "name a term"),
    "a reward for sft": (SFT, {"reward": "math"}, "reward is given", "set method to grpo"),
    "sampling for sft": (SFT, {"rollout.group_size": 4}, "rollout is given", "set method to grpo"),
    "a penalty for sft": (SFT, {"kl.coef": 0.1}, "kl is given", "set method to grpo"),
    "a limit of prompts for sft": (
        SFT,
        {"data.max_prompt_length": 9},
        "data.max_prompt_length is 9",
        "data.max_length",
    ),
    "a batch size for grpo": (GRPO, {"train.batch_size": 4}, "train.batch_size is 4", "prompts_per_step (32) x "),
    "accumulation for grpo": (GRPO, {"train.accumulation": 2}, "train.accumulation is 2", "rollout.prompts_per_step"),
    "a length of rows for grpo": (GRPO, {"data.max_length": 64}, "data.max_length is 64", "data.max_prompt_length"),
    "a group of one": (GRPO, {"rollout.group_size": 1}, "rollout.group_size is 1, but credit 'grpo'", "raise it"),
    "a group of one by rloo": (
        GRPO,
        {"rollout.group_size": 1, "credit": "rloo"},
        "rollout.group_size is 1, but credit 'rloo'",
        "at least 2",
    ),
    "more steps than groups": (
        GRPO,
        {"rollout.prompts_per_step": 4, "rollout.optimizer_steps": 5},
        "rollout.optimizer_steps is 5",
        "only 4 groups",
    ),
    "an evaluation of rows that samples": (SFT, {"eval.temperature": 0.5}, "eval.temperature is 0.5", "losses of rows"),
    "a batch size of sampled evaluation": (GRPO, {"eval.batch_size": 4}, "eval.batch_size is 4", "samples completions"),
    "a system message of plain text": (
        SFT,
        {"data.system": "Hi", "data.chat": "never"},
        "data.system is given",
        "data.chat",
    ),
    "a step of a reference that stands": (
        {**SFT, "method": "dpo"},
        {"reference.sync_alpha": 0.3},
        "reference.sync_alpha is 0.3",
        "give reference.sync_steps",
    ),
    "a teacher's completions that are never used": (
        {**SFT, "method": "gkd", "distill.teacher": "t"},
        {"distill.seq_kd": True, "distill.lmbda": 1},
        "distill.seq_kd is true",
        "lower distill.lmbda",
    ),
    "k1 as a loss": (GRPO, {"kl.type": "k1"}, "kl.type is 'k1'", "use k2, k3 or low_var_kl"),
    "loss and terms": (SFT, {"loss": "dft", "terms": ["sft"]}, "loss and terms are both given", "keep one"),
    "fp16 on a CPU": (
        SFT,
        {"backend.device": "cpu", "backend.precision": "fp16"},
        "backend.precision is 'fp16'",
        "use bf16 or float32",
    ),
    "float16 weights on a CPU": (
        SFT,
        {"backend.device": "cpu", "model.dtype": "float16"},
        "model.dtype is 'float16'",
        "use float32",
    ),
    "float16 weights under fp16": (
        SFT,
        {"backend.precision": "fp16", "model.dtype": "float16"},
        "model.dtype is 'float16'",
        "use model.dtype float32",
    ),
    "quantised weights alone": (
        SFT,
        {"model.quantization": {}},
        "model.quantization is given, but weights of 4 bits cannot be trained",
        "add model.adapter",
    ),
    "a 4-bit type in 8 bits": (
        SFT,
        {"model.adapter": {}, "model.quantization.bits": 8, "model.quantization.type": "fp4"},
        "model.quantization.type is 'fp4'",
        "remove it, or use 4 bits",
    ),
    "DoRA on 8 bits": (
        SFT,
        {"model.adapter.dora": True, "model.quantization.bits": 8},
        "model.adapter.dora is true",
        "model.quantization.bits 4",
    ),
    "warm-up beyond the end": (
        SFT,
        {"optim.warmup_steps": 11, "train.steps": 10},
        "optim.warmup_steps is 11, more than the 10 steps",
        "lower it",
    ),
    "an end that is never reached": (
        SFT,
        {"optim.schedule": "constant", "optim.min_lr_ratio": 0.1},
        "optim.min_lr_ratio is 0.1",
        "use linear or cosine",
    ),
    "two sources of evaluation": (
        SFT,
        {"data.eval": "e", "data.eval_share": 0.1},
        "data.eval_share is 0.1, but data.eval",
        "keep one",
    ),
    "evaluation of nothing": (
        SFT,
        {"eval.every_steps": 5},
        "eval.every_steps is 5",
        "give data.eval or data.eval_share",
    ),
    "the best of nothing": (SFT, {"checkpoint.best": True}, "checkpoint.best is true", "give data.eval"),
    "patience without evaluations": (
        SFT,
        {"data.eval": "e", "eval.patience": 2},
        "eval.patience is 2",
        "give eval.every_steps or eval.every_epochs",
    ),
    "the best without an evaluation": (
        SFT,
        {"data.eval": "e", "eval.at_end": False, "checkpoint.best": True},
        "checkpoint.best is true, but no evaluation is made",
        "give eval.every_steps",
    ),
    "an evaluation of rows on several sets": (
        SFT,
        {"eval.sets": {"aime": {"path": "a"}}},
        "eval.sets is {'aime'",
        "losses of rows",
    ),
    "a metric of a set that is not there": (
        GRPO,
        {"eval.sets": {"aime": {"path": "a"}}, "eval.metric": "eval/amie/pass@1"},
        "eval.metric is 'eval/amie/pass@1', but there is no set 'amie'; did you mean aime?",
        "as in eval/aime/reward",
    ),
    "a metric of data that are not there": (
        GRPO,
        {"eval.sets": {"aime": {"path": "a"}}, "eval.metric": "eval/reward"},
        "eval.metric is 'eval/reward', but it is about data.eval",
        "as in eval/aime/reward",
    ),
    "several greedy samples of a set": (
        GRPO,
        {"eval.sets": {"aime": {"path": "a", "num_samples": 4}}, "eval.temperature": 0},
        "eval.sets.aime.num_samples is 4, but at eval.sets.aime.temperature 0",
        "use 1",
    ),
    "the name of a metric for a set": (
        GRPO,
        {"eval.sets": {"reward": {"path": "a"}}},
        "eval.sets: 'reward' cannot be the name of a set",
        "letters, digits",
    ),
    "a metric of training": (SFT, {"eval.metric": "loss"}, "eval.metric is 'loss'", "as in eval/loss"),
    "a metric without a direction": (SFT, {"eval.metric": "eval/kl"}, "eval.metric is 'eval/kl'", "set eval.mode"),
    "the same sample many times": (
        GRPO,
        {"data.eval": "e", "eval.num_samples": 4, "eval.temperature": 0},
        "eval.num_samples is 4, but at eval.temperature 0",
        "use 1",
    ),
    "a stop text that is everywhere": (
        GRPO,
        {"rollout.stop": ["a", ""]},
        "rollout.stop holds an empty text",
        "remove it",
    ),
    "a template without its place": (SFT, {"data.prompt_template": "Q:"}, "data.prompt_template: 'Q:'", "{prompt}"),
    "too few prompts at a time": (
        GRPO,
        {"rollout.oversampling": 16},
        "rollout.oversampling is 16, but a step needs 32 groups",
        "raise it",
    ),
    "over-sampling without a pause": (
        GRPO,
        {"rollout.oversampling": 64, "rollout.mode": "async"},
        "rollout.oversampling is 64, but in mode async",
        "remove it",
    ),
    "nothing to go on with": (GRPO, {"rollout.partial": True}, "rollout.partial is true, but nothing", "oversampling"),
    "nothing that was begun earlier": (
        GRPO,
        {"rollout.mask_offpolicy": True},
        "rollout.mask_offpolicy is true, but without rollout.partial",
        "remove it",
    ),
    "no left-over groups": (
        GRPO,
        {"rollout.buffer.use": "pop_first"},
        "rollout.buffer is 'pop_first', but",
        "remove it",
    ),
    "nothing is rejected": (GRPO, {"rollout.max_fetches": 3}, "rollout.max_fetches is 3, but without", "remove it"),
    "nothing grows stale": (
        GRPO,
        {"rollout.max_staleness": 2},
        "rollout.max_staleness is 2, but in mode sync",
        "async",
    ),
    "too little staleness": (
        GRPO,
        {
            "rollout.max_staleness": 3,
            "rollout.mode": "async",
            "rollout.optimizer_steps": 2,
            "rollout.num_ppo_epochs": 2,
        },
        "rollout.max_staleness is 3, but in mode async",
        "give at least 4",
    ),
    "a step off, and how far": (
        GRPO,
        {"rollout.max_staleness": 3, "rollout.mode": "one_step_off"},
        "rollout.max_staleness is 3, but in mode one_step_off",
        "remove it",
    ),
    "what to do with nothing": (GRPO, {"rollout.stale": "drop"}, "rollout.stale is 'drop', but nothing", "remove it"),
    "two that play": (
        GRPO,
        {"rollout.generate.use": "mine:play", "env.use": "single"},
        "rollout.generate is 'mine:play', but env is given",
        "remove one",
    ),
    "a filter for rows": (
        {**SFT, "method": "gkd", "distill.teacher": "teacher"},
        {"rollout.mode": "async"},
        "rollout.mode is 'async', but gkd has no use for it",
        "remove it",
    ),
    "the embedded engine's settings for another": (
        GRPO,
        {"engine.use": "mine:Engine", "engine.packed_weights": False},
        "engine.packed_weights is false, but only the embedded engine has it",
        "remove it",
    ),
    "where another engine is to put its keys": (
        GRPO,
        {"engine.use": "mine:Engine", "engine.cache": "paged"},
        "engine.cache is 'paged', but only the embedded engine has it",
        "remove it",
    ),
    "a backend that there is not": (SFT, {"backend.use": "fdsp"}, "backend.use is 'fdsp', which is no", "mean fsdp?"),
    "an engine that there is not": (GRPO, {"engine.use": "vlm"}, "engine.use is 'vlm', which is no", "mean vllm?"),
    "an address without a scheme": (
        GRPO,
        {"engine.use": "vllm", "engine.address": "localhost:8000"},
        "engine.address has 'localhost:8000'",
        "http://host:port",
    ),
    "no address in the list": (
        GRPO,
        {"engine.use": "vllm", "engine.address": []},
        "engine.address has []",
        "http://host:port",
    ),
    "the same server twice": (
        GRPO,
        {"engine.use": "vllm", "engine.address": ["http://a:1", "http://a:1"]},
        "engine.address names a server twice",
        "name each once",
    ),
}


@pytest.mark.parametrize("base,changes,begins,says", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_told_alone_with_value_and_remedy(base: dict, changes: dict, begins: str, says: str):
    error = error_of(base, **changes)
    assert error.startswith(begins) and says in error
    assert "\n" not in error


FINE = {
    "sft": (SFT, {}),
    "grpo": (GRPO, {}),
    "a pair": (GRPO, {"rollout.group_size": 2}),
    "a group of one with a credit of one's own": (GRPO, {"rollout.group_size": 1, "credit": "a.b:own"}),
    "as many steps as groups": (GRPO, {"rollout.prompts_per_step": 4, "rollout.optimizer_steps": 4}),
    "an entropy bonus in sft": (SFT, {"entropy_coef": 0.1}),
    "fp16 where there may be a GPU": (SFT, {"backend.precision": "fp16"}),
    "fp16 over frozen float16 weights": (
        SFT,
        {"backend.precision": "fp16", "model.dtype": "float16", "model.adapter.rank": 4},
    ),
    "warm-up to the end": (SFT, {"optim.warmup_steps": 10, "train.steps": 10}),
    "patience with evaluations": (SFT, {"data.eval_share": 0.1, "eval.patience": 2, "eval.every_epochs": 1}),
    "the best of the end": (SFT, {"data.eval": "e", "checkpoint.best": True}),
    "a metric whose direction is given": (SFT, {"eval.metric": "eval/kl", "eval.mode": "min"}),
    "a system message of a chat": (SFT, {"data.system": "Hi", "data.chat": "always"}),
    "a reference that moves by thirds": (
        {**SFT, "method": "dpo"},
        {"reference.sync_alpha": 0.3, "reference.sync_steps": 5},
    ),
    "the best of a set": (
        GRPO,
        {"eval.sets": {"aime": {"path": "a"}}, "checkpoint.best": True, "eval.metric": "eval/aime/pass@1"},
    ),
    "several samples of a set that is not greedy": (
        GRPO,
        {"eval.sets": {"aime": {"path": "a", "num_samples": 4, "temperature": 1}}, "eval.temperature": 0},
    ),
    "one greedy sample": (GRPO, {"data.eval": "e", "eval.temperature": 0}),
}


@pytest.mark.parametrize("base,changes", FINE.values(), ids=FINE.keys())
def test_what_goes_together_passes(base: dict, changes: dict):
    values = {name: value for name, value in {**base, **changes}.items() if value is not None}
    assert from_values(values).config.method == base["method"]


def test_what_does_not_train_needs_nothing_to_train_on():
    values = {"model": "tiny", "data.eval": "held_out.jsonl"}
    assert from_values(values, trains=False).config.data.train is None
    with pytest.raises(ConfigError, match=r"^reward is missing"):
        from_values(values, method="grpo", trains=False)


def test_rules_are_applied_to_what_is_right_beside_what_is_wrong():
    error = error_of(GRPO, **{"model": None, "optim.lr": -1, "reward": {"weight": 1}, "rollout.group_size": 1})
    assert [line.strip(" -").split(" ")[0] for line in error.splitlines()[1:]] == [
        "model.path",
        "optim.lr",
        "reward.use",
        "rollout.group_size",
    ]


def test_a_rule_about_a_wrong_value_waits_until_it_is_right():
    error = error_of(SFT, **{"optim.warmup_steps": "x", "train.steps": 0})
    assert [line.split(" must ")[0].strip(" -") for line in error.splitlines()[1:]] == [
        "train.steps",
        "optim.warmup_steps",
    ]


def test_the_source_of_a_broken_rule_is_told():
    error = error_of({**GRPO}, **{"rollout.group_size": 1})
    assert error.endswith("(from the call)")


def test_the_direction_of_a_metric_is_read_from_its_name():
    down = ("eval/loss", "eval/perplexity", "eval/nll_loss")
    up = ("eval/reward", "eval/mean_token_accuracy", "eval/rewards/accuracies", "eval/pass@4")
    assert [metric_mode(name) for name in (*down, *up, "eval/kl")] == ["min"] * 3 + ["max"] * 4 + [None]
    # What a set is called says nothing.
    assert metric_mode("eval/no_loss/reward", ["no_loss"]) == "max"
    assert metric_mode("eval/high_score/kl", ["high_score"]) is None


def test_names_known_here_are_those_that_exist():
    assert set(TRAINS) == set(METHODS)
    assert set(GROUP_CREDITS) == {name for name, rule in CREDITS.items() if rule.min_group > 1}
