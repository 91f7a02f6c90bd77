"""Names of other tools: every one is set where it belongs, or without effect and says why, or refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from whet.config.aliases import ALIASES, PREFIXES
from whet.config.base import Plugin
from whet.config.loader import Loaded, from_values, load
from whet.config.names import find, is_open
from whet.config.rules import METHOD_NAMES
from whet.errors import ConfigError
from whet.recipe import method_of

NO_EFFECT = "no effect"
REFUSED = "refused"

# Name -> an ordinary value, and the settings that it makes of it; a name that is ours already sets itself.
HUGGING_FACE: Mapping[str, tuple[Any, Any]] = {
    "model_name_or_path": ("m", {"model.path": "m"}),
    "output_dir": ("o", {"output_dir": "o"}),
    "per_device_train_batch_size": (4, {"train.batch_size": 4}),
    "gradient_accumulation_steps": (2, {"train.accumulation": 2}),
    "learning_rate": ("1e-5", {"optim.lr": 1e-5}),
    "num_train_epochs": (3, {"train.epochs": 3.0}),
    "max_steps": (7, {"train.steps": 7}),
    "lr_scheduler_type": ("cosine", {"optim.schedule": "cosine"}),
    "warmup_ratio": (0.1, {"optim.warmup_ratio": 0.1}),
    "warmup_steps": (5, {"optim.warmup_steps": 5}),
    "weight_decay": (0.1, {"optim.weight_decay": 0.1}),
    "max_grad_norm": (0.5, {"optim.max_grad_norm": 0.5}),
    "bf16": (True, {"backend.precision": "bf16"}),
    "fp16": (True, {"backend.precision": "fp16"}),
    "gradient_checkpointing": (True, {"backend.activation_checkpointing": True}),
    "logging_steps": (10, {"log.every_steps": 10}),
    "save_steps": (20, {"checkpoint.every_steps": 20}),
    "eval_steps": (30, {"eval.every_steps": 30}),
    "save_total_limit": (2, {"checkpoint.keep": 2}),
    "load_best_model_at_end": (True, {"checkpoint.best": True}),
    "metric_for_best_model": ("eval_loss", {"eval.metric": "eval/loss"}),
    "seed": (3, {"seed": 3}),
    "report_to": ("none", {"log.tensorboard": False}),
    "resume_from_checkpoint": ("runs/a", {"checkpoint.resume": "runs/a"}),
    "max_length": (64, {"data.max_length": 64}),
    "packing": (True, NO_EFFECT),
    "lora_r": (4, {"model.adapter.rank": 4}),
    "lora_alpha": (16, {"model.adapter.alpha": 16.0}),
    "lora_dropout": (0.1, {"model.adapter.dropout": 0.1}),
    "lora_target_modules": (["q_proj"], {"model.adapter.target_modules": ["q_proj"]}),
    "load_in_4bit": (True, {"model.quantization.bits": 4}),
    "load_in_8bit": (True, {"model.quantization.bits": 8}),
    "bnb_4bit_quant_type": ("fp4", {"model.quantization.type": "fp4"}),
    "bnb_4bit_use_double_quant": (False, {"model.quantization.double": False}),
    "bnb_4bit_compute_dtype": ("bfloat16", {"model.quantization.compute_dtype": "bfloat16"}),
    "use_rslora": (True, {"model.adapter.rslora": True}),
    "use_dora": (True, {"model.adapter.dora": True}),
    "init_lora_weights": ("pissa", {"model.adapter.init": "pissa"}),
    "attn_implementation": ("sdpa", REFUSED),
}
SFT_TRAINER: Mapping[str, tuple[Any, Any]] = {
    "experiment_name": ("my_run", {"output_dir": "runs/my_run"}),
    "model_name": ("m", {"model.path": "m"}),
    "model_type": ("Qwen", NO_EFFECT),
    "train_file": ("t", {"data.train": "t"}),
    "eval_file": ("e", {"data.eval": "e"}),
    "batch_size": (4, {"train.batch_size": 4}),
    "use_lora": (True, {"model.adapter.rank": 8}),
    "lora_rank": (16, {"model.adapter.rank": 16}),
    "freeze_layers": ([0, 1, 2, 3, 4, 5], {"model.freeze.layers": [0, 1, 2, 3, 4, 5]}),
    "use_amp": (True, {"backend.precision": "bf16"}),
    "use_gradient_checkpointing": (True, {"backend.activation_checkpointing": True}),
    "warmup_steps_ratio": (0.1, {"optim.warmup_ratio": 0.1}),
    "max_seq_length": (64, {"data.max_length": 64}),
    "prompt_template": ("Q: {prompt}", {"data.prompt_template": "Q: {prompt}"}),
    "response_template": ("A: {response}", {"data.response_template": "A: {response}"}),
    "device": ("cpu", {"backend.device": "cpu"}),
    "adam_beta1": (0.8, {"optim.beta1": 0.8}),
    "adam_beta2": (0.98, {"optim.beta2": 0.98}),
    "adam_epsilon": ("1e-7", {"optim.eps": 1e-7}),
}
RLHF_TOOLKIT: Mapping[str, tuple[Any, Any]] = {
    "train_mode": ("lora", {"model.adapter.rank": 8}),
    "lmbda": (0.25, {"distill.lmbda": 0.25}),
    "beta": (0.1, {"loss": {"beta": 0.1}}),
    "seq_kd": (True, {"distill.seq_kd": True}),
    "teacher_model_name_or_path": ("m", {"distill.teacher": "m"}),
    "max_new_tokens": (64, {"rollout.max_tokens": 64}),
    "temperature": (0.9, {"rollout.temperature": 0.9}),
}
TRL: Mapping[str, tuple[Any, Any]] = {
    "loss_type": ("ipo", {"loss": {"use": "ipo"}}),
    "beta": (0.2, {"loss": {"beta": 0.2}}),
    "label_smoothing": (0.1, {"loss": {"label_smoothing": 0.1}}),
    "rpo_alpha": (0.5, {"nll_coef": 0.5}),
    "cpo_alpha": (1.0, {"nll_coef": 1.0}),
    "ld_alpha": (0.5, {"loss": {"ld_alpha": 0.5}}),
    "use_weighting": (True, {"loss": {"wpo": True}}),
    "f_divergence_type": ("js_divergence", {"loss": {"f_divergence": "js"}}),
    "f_alpha_divergence_coef": (0.7, {"loss": {"f_alpha": 0.7}}),
    "discopop_tau": (0.1, {"loss": {"tau": 0.1}}),
    "precompute_ref_log_probs": (True, {"reference.precompute": True}),
    "sync_ref_model": (True, {"reference.sync_steps": 512}),
    "ref_model_sync_steps": (64, {"reference.sync_steps": 64}),
    "use_peft": (True, {"model.adapter.type": "lora"}),
    "model_revision": ("v2", {"model.revision": "v2"}),
    "trust_remote_code": (True, {"model.trust_remote_code": True}),
    "dtype": ("bfloat16", {"model.dtype": "bfloat16"}),
    "padding_free": (True, NO_EFFECT),
    "truncation_mode": ("keep_start", NO_EFFECT),
    "dataset_num_proc": (4, NO_EFFECT),
    "activation_offloading": (True, REFUSED),
    "max_prompt_length": (64, REFUSED),
    "deepspeed": ("zero3.json", REFUSED),
    "fsdp": ("full_shard auto_wrap", {"backend.use": "fsdp"}),
    "fsdp_config": ({"reshard_after_forward": False}, {"backend.use": "fsdp", "backend.reshard_after_forward": False}),
    "num_processes": (1, {"cluster.num_processes": 1}),
}
LLAMA_FACTORY: Mapping[str, tuple[Any, Any]] = {
    "stage": ("dpo", {"method": "dpo"}),
    "finetuning_type": ("lora", {"model.adapter.type": "lora"}),
    "lora_target": ("q_proj, v_proj", {"model.adapter.target_modules": ["q_proj", "v_proj"]}),
    "cutoff_len": (64, {"data.max_length": 64}),
    "pref_loss": ("hinge", {"loss": {"use": "hinge"}}),
    "pref_beta": (0.2, {"loss": {"beta": 0.2}}),
    "pref_ftx": (0.5, {"nll_coef": 0.5}),
    "dpo_label_smoothing": (0.1, {"loss": {"label_smoothing": 0.1}}),
    "ref_model": ("m", {"reference.path": "m"}),
    "quantization_bit": (4, {"model.quantization.bits": 4}),
    "quantization_type": ("fp4", {"model.quantization.type": "fp4"}),
    "pissa_init": (True, {"model.adapter.init": "pissa_niter_16"}),
    "pissa_iter": (4, {"model.adapter.init": "pissa_niter_4"}),
    "pure_bf16": (True, {"model.dtype": "bfloat16"}),
    "default_system": ("Be brief.", {"data.system": "Be brief."}),
    "enable_thinking": (False, {"data.template_kwargs": {"enable_thinking": False}}),
    "train_on_prompt": (True, {"data.train_on": "all"}),
    "disable_shuffling": (True, {"data.shuffle": False}),
    "disable_gradient_checkpointing": (False, {"backend.activation_checkpointing": True}),
    "template": ("qwen", NO_EFFECT),
    "flash_attn": ("fa2", NO_EFFECT),
    "neat_packing": (True, NO_EFFECT),
    "overwrite_cache": (True, NO_EFFECT),
    "preprocessing_num_workers": (16, NO_EFFECT),
    "plot_loss": (True, NO_EFFECT),
    "mask_history": (True, REFUSED),
    "use_galore": (True, REFUSED),
    "adapter_name_or_path": ("saves/a", REFUSED),
}
SLIME: Mapping[str, tuple[Any, Any]] = {
    "rollout-batch-size": (16, {"rollout.prompts_per_step": 16}),
    "n-samples-per-prompt": (4, {"rollout.group_size": 4}),
    "num-rollout": (3000, {"train.steps": 3000}),
    "rollout-max-response-len": (128, {"rollout.max_tokens": 128}),
    "rollout-temperature": (0.8, {"rollout.temperature": 0.8}),
    "num-steps-per-rollout": (2, {"rollout.optimizer_steps": 2}),
    "global-batch-size": (256, {"rollout.prompts_per_step": 32, "rollout.group_size": 8}),
    "use-dynamic-batch-size": (True, NO_EFFECT),
    "max-tokens-per-gpu": (4608, {"backend.max_tokens_per_device": 4608}),
    "balance-data": (True, NO_EFFECT),
    "advantage-estimator": ("rloo", {"credit.use": "rloo"}),
    "use-kl-loss": (False, {"kl.coef": 0.0}),
    "kl-loss-coef": (0.01, {"kl.coef": 0.01}),
    "kl-loss-type": ("low_var_kl", {"kl.type": "low_var_kl"}),
    "entropy-coef": (0.01, {"entropy_coef": 0.01}),
    "eps-clip": (0.2, {"loss": {"clip_low": 0.2, "clip_high": 0.2}}),
    "eps-clip-high": (0.28, {"loss": {"clip_high": 0.28}}),
    "over-sampling-batch-size": (64, {"rollout.oversampling": 64}),
    "dynamic-sampling-filter-path": (
        "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
        {"rollout.filter": Plugin(use="nonzero_std")},
    ),
    "rollout-sample-filter-path": ("my.f", {"rollout.sample_filter": Plugin(use="my.f")}),
    "custom-generate-function-path": ("my.generate", {"rollout.generate": Plugin(use="my.generate")}),
    "rollout-function-path": ("slime.rollout.sglang_rollout.generate_rollout", {"rollout.mode": "sync"}),
    "data-source-path": ("slime.rollout.data_source.RolloutDataSourceWithBuffer", {"rollout.source": None}),
    "kl-coef": (0.01, {"kl.coef": 0.01, "kl.where": "reward"}),
    "use-unbiased-kl": (True, {"kl.unbiased": True}),
    "eps-clip-c": (3.0, {"loss": {"dual_clip": 3.0}}),
    "normalize-advantages": (True, {"shaping.whiten": True}),
    "use-tis": (True, {"correction.use": "tis"}),
    "use-rollout-logprobs": (True, {"rollout.old_logprobs": "sampler"}),
    "use-opsm": (True, {"correction.opsm": 1e-4}),
    "opsm-delta": (0.01, {"correction.opsm": 0.01}),
    "custom-tis-function-path": ("a.b", REFUSED),
    "critic-load": ("m_dist", REFUSED),
    "eval-top-k": (-1, {"eval.top_k": 0}),
    "eval-temperature": (0.5, {"eval.temperature": 0.5}),
    "eval-max-prompt-len": (9, REFUSED),
    "skip-eval-before-train": (True, {"eval.at_start": False}),
    "log-passrate": (True, NO_EFFECT),
    "debug-rollout-only": (True, {"debug.rollout_only": True}),
    "debug-train-only": ("runs/a", {"debug.train_only": "runs/a"}),
    "save-debug-rollout-data": ("dump/{rollout_id}.pt", {"log.rollouts": True}),
    "dump-details": ("dump", {"log.rollouts": True}),
    "load-debug-rollout-data": ("dump/{rollout_id}.pt", REFUSED),
    "rm-type": ("exact", {"reward.use": "exact"}),
    "custom-rm-path": ("a.b.reward", {"reward.use": "a.b.reward"}),
    "prompt-data": ("p.jsonl", {"data.train": "p.jsonl"}),
    "input-key": ("question", {"data.columns": {"prompt": "question"}}),
    "label-key": ("answer", {"data.columns": {"label": "answer"}}),
    "apply-chat-template": (True, {"data.chat": "always"}),
    "rollout-shuffle": (True, {"data.shuffle": True}),
    "eval-interval": (5, {"eval.every_steps": 5}),
    "eval-prompt-data": ("e.jsonl", {"data.eval": "e.jsonl"}),
    "n-samples-per-eval-prompt": (16, {"eval.num_samples": 16}),
    "eval-max-response-len": (512, {"eval.max_tokens": 512}),
    "eval-top-p": (0.7, {"eval.top_p": 0.7}),
    "colocate": (True, {"cluster.colocate": True, "engine.sleep": True, "engine.use": "sglang"}),
    "actor-num-nodes": (
        4,
        {"cluster.num_nodes": 4, "cluster.address": "auto", "backend.use": "megatron"},
    ),
    "actor-num-gpus-per-node": (8, {"cluster.devices_per_node": 8, "backend.use": "megatron"}),
    "rollout-num-gpus": (1, {"engine.num_engines": 1}),
    "rollout-num-gpus-per-engine": (2, {"engine.tensor_parallel": 2, "engine.use": "sglang"}),
    "hf-checkpoint": ("m", {"model.path": "m"}),
    "ref-load": ("m_dist", REFUSED),
    "load": ("m_slime", REFUSED),
    "save": ("o", {"output_dir": "o"}),
    "save-interval": (20, {"checkpoint.every_steps": 20}),
    "optimizer": ("adam", NO_EFFECT),
    "lr": ("1e-6", {"optim.lr": 1e-6}),
    "lr-decay-style": ("constant", {"optim.schedule": "constant"}),
    "tensor-model-parallel-size": (1, {"backend.tensor_parallel": 1, "backend.use": "local"}),
    "recompute-granularity": ("full", {"backend.activation_checkpointing": True}),
    "recompute-method": ("uniform", NO_EFFECT),
    "optimizer-cpu-offload": (
        True,
        {"backend.options": {"optimizer_cpu_offload": True}, "backend.use": "megatron"},
    ),
    "train-backend": ("fsdp", {"backend.use": "fsdp"}),
    "distributed-timeout-minutes": (10, {"backend.timeout_s": 600.0}),
    "update-weight-buffer-size": (2**29, {"engine.publish.bucket_mb": 512, "engine.use": "sglang"}),
    "use-fault-tolerance": (True, NO_EFFECT),
}
CASES = [
    pytest.param(method, name, value, outcome, id=f"{origin}-{name}")
    for origin, method, table in (
        ("hf", "sft", HUGGING_FACE),
        ("sft", "sft", SFT_TRAINER),
        ("toolkit", "gkd", RLHF_TOOLKIT),
        ("trl", "dpo", TRL),
        ("factory", "dpo", LLAMA_FACTORY),
        ("slime", "grpo", SLIME),
    )
    for name, (value, outcome) in table.items()
]


def base_of(method: str, taken: Any) -> dict[str, Any]:
    """The least that a run needs, without what the name under test sets itself."""
    base: dict[str, Any] = {"model.path": "tiny", "data.train": "rows.jsonl", "data.eval": "held_out.jsonl"}
    base |= {"reward.use": "math"} if method == "grpo" else {}
    base |= {"distill.teacher": "teacher"} if method == "gkd" else {}
    quantised = isinstance(taken, dict) and any(name.startswith("model.quantization") for name in taken)
    base |= {"model.adapter.type": "lora"} if quantised else {}
    return {name: value for name, value in base.items() if not (isinstance(taken, dict) and name in taken)}


def value_at(loaded: Loaded, path: str) -> Any:
    node: Any = loaded.config
    for part in path.split("."):
        node = getattr(node, part)
    return node


def check(read: Any, name: str, outcome: Any) -> None:
    """What becomes of a name that `read` reads."""
    if outcome == REFUSED:
        with pytest.raises(ConfigError, match=rf"{name.replace('-', '_')} is .*, but it (is refused: \w|cannot be \w)"):
            read()
        return
    loaded = read()
    noted = [note for note in loaded.notes if note.startswith(f"{name.replace('-', '_')} has no effect: ")]
    assert len(noted) == (outcome == NO_EFFECT)
    for path, value in outcome.items() if isinstance(outcome, dict) else ():
        assert value_at(loaded, path) == value


@pytest.mark.parametrize("method,name,value,outcome", CASES)
def test_a_name_in_the_file_works_or_says_why_not(
    method: str, name: str, value: Any, outcome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    check(lambda: from_values({**base_of(method, outcome), name: value}, method=method), name, outcome)


@pytest.mark.parametrize("method,name,value,outcome", CASES)
def test_a_name_as_a_flag_works_or_says_why_not(method: str, name: str, value: Any, outcome: Any):
    base = [part for path, setting in base_of(method, outcome).items() for part in (f"--{path}", setting)]
    for spelling in (name.replace("_", "-"), name.replace("-", "_")):
        flag = [f"--{spelling}"] if value is True else [f"--{spelling}", str(value)]
        check(lambda flag=flag: load(method, None, [*base, *flag]), name, outcome)


def test_every_alias_sets_what_exists_and_hides_nothing_of_ours():
    for name, alias in ALIASES.items():
        assert find((name,)) is None, f"{name} is a setting of ours"
        assert name == name.lower().replace("-", "_")
        for target in alias.targets:
            path = tuple(target.split("."))
            assert find(path) is not None or is_open(path), f"{name} sets {target}, which does not exist"
        assert (alias.effect == "sets") == bool(alias.targets)
        assert alias.targets or alias.note


def test_every_setting_that_a_conversion_makes_is_among_its_targets():
    samples = (True, False, None, "m", "lora", "full", "rloo", "epoch", "no", "none", "cosine", 1, -1, 0.5, ["a"])
    seen = 0
    for alias, method in product(ALIASES.values(), METHOD_NAMES):
        for sample in samples:
            try:
                made = set(alias.convert(sample, method))
            except ValueError:
                continue
            assert made <= set(alias.targets), f"{alias.name}: {sample} sets {made - set(alias.targets)}"
            seen += len(made)
    assert seen > 500


def read(method: str = "sft", **values: Any) -> Loaded:
    return from_values({**base_of(method, {}), **values}, method=method)


def error_of(method: str = "sft", **values: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        read(method, **values)
    return str(raised.value)


@pytest.mark.parametrize(
    "values,path,expected",
    [
        ({"max_steps": -1}, "train.steps", None),
        ({"device": None}, "backend.device", "auto"),
        ({"device": "cuda:0"}, "backend.device", "cuda"),
        ({"freeze_layers": 6}, "model.freeze.layers", 6),
        ({"pissa_init": True, "pissa_iter": -1}, "model.adapter.init", "pissa"),
        ({"lora_target": "all"}, "model.adapter.target_modules", "all-linear"),
        ({"warmup_steps": 0.1}, "optim.warmup_ratio", 0.1),
        ({"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, "optim.min_lr_ratio", 0.1),
        ({"tf32": True}, "backend.matmul", "high"),
        ({"freeze_layers": None}, "model.freeze.layers", 0),
        ({"use_lora": False}, "model.adapter", None),
        ({"use_lora": True, "lora_rank": 4}, "model.adapter.rank", 4),
        ({"train_mode": "full"}, "model.adapter", None),
        ({"bf16": False}, "backend.precision", "float32"),
        ({"bf16": None}, "backend.precision", "auto"),
        ({"bf16": False, "fp16": True}, "backend.precision", "fp16"),
        ({"bf16": True, "fp16": False}, "backend.precision", "bf16"),
        ({"use_amp": False}, "backend.precision", "float32"),
        ({"lr_scheduler_type": "constant_with_warmup"}, "optim.schedule", "constant"),
        ({"report_to": ["tensorboard"]}, "log.tensorboard", True),
        ({"report_to": []}, "log.tensorboard", False),
        ({"resume_from_checkpoint": True}, "checkpoint.resume", True),
        ({"resume_from_checkpoint": None}, "checkpoint.resume", "auto"),
        ({"metric_for_best_model": "loss"}, "eval.metric", "eval/loss"),
        ({"metric_for_best_model": "eval/f", "greater_is_better": True}, "eval.mode", "max"),
        ({"eval_strategy": "epoch"}, "eval.every_epochs", 1),
        ({"eval_strategy": "steps", "eval_steps": 9}, "eval.every_steps", 9),
        ({"eval_strategy": False}, "eval.at_end", False),
        ({"save_strategy": "epoch"}, "checkpoint.every_epochs", 1),
        ({"load_in_4bit": False, "load_in_8bit": None}, "model.quantization", None),
        ({"use_dora": False, "use_rslora": None}, "model.adapter", None),
        ({"init_lora_weights": True}, "model.adapter.init", "default"),
        ({"bnb_4bit_quant_type": "fp4", "use_lora": True}, "model.quantization.bits", 4),
        ({"train_mode": "qlora"}, "model.quantization.bits", 4),
        ({"train_mode": "qlora"}, "model.adapter.type", "lora"),
        ({"train_mode": "lora"}, "model.quantization", None),
        ({"apply_chat_template": False}, "data.chat", "never"),
        ({"optim": {"learning_rate": "1e-5"}}, "optim.lr", 1e-5),
        ({"model": {"use_lora": True}}, "model.adapter.type", "lora"),
        ({"global_batch_size": 8}, "train.batch_size", 8),
    ],
)
def test_values_are_said_in_our_way(values: dict, path: str, expected: object):
    assert value_at(read(**values), path) == expected


@pytest.mark.parametrize(
    "values,message",
    [
        ({"device": "cuda:1"}, "set CUDA_VISIBLE_DEVICES"),
        ({"use_lora": "yes please"}, "it must be true or false"),
        ({"use_lora": False, "lora_rank": 8}, "model.adapter is given twice"),
        ({"train_mode": "dora"}, "must be full, lora or qlora"),
        ({"load_in_4bit": True, "load_in_8bit": True, "lora_r": 4}, "model.quantization.bits is given twice"),
        ({"load_in_4bit": False, "train_mode": "qlora"}, "but model.quantization.bits is 4; keep one of the two"),
        ({"use_dora": False, "model.adapter.dora": True}, "but model.adapter.dora is true; keep one of the two"),
        ({"init_lora_weights": False}, "a random update; use true"),
        ({"init_lora_weights": "eva"}, "model.adapter.init: 'eva' is not among default, gaussian, pissa"),
        ({"bf16": True, "fp16": True}, "backend.precision is given twice"),
        ({"bf16": False, "backend.precision": "bf16"}, "bf16 is false (from the call), but backend.precision is bf16"),
        ({"use_amp": False, "fp16": True}, "use_amp is false (from the call), but backend.precision is fp16"),
        ({"report_to": ["wandb", "tensorboard"]}, "cannot include wandb"),
        ({"experiment_name": "../up"}, "must be a plain name"),
        ({"eval_strategy": "best"}, "must be no, steps or epoch"),
        ({"lr_scheduler_type": "polynomial"}, "optim.schedule must be one of linear, cosine or constant"),
        ({"tensor_model_parallel_size": True}, "must be a whole number"),
        ({"tensor_model_parallel_size": 2}, "1 processes train (cluster), but each copy of the model takes"),
        ({"recompute_granularity": "selective"}, "must be full"),
        ({"rollout_num_gpus": 4, "engine": {"use": "sglang", "tensor_parallel": 2}}, "set engine.num_engines to 2"),
        ({"use_vllm": True, "engine": {"use": "sglang"}}, "given twice"),
        ({"fsdp": "hybrid_shard"}, "must be full_shard or shard_grad_op"),
        ({"fsdp_config": {"mystery": 1}}, "has mystery, which has no counterpart"),
        ({"optimizer": "sgd"}, "AdamW is the optimizer"),
        ({"global_batch_size": True}, "must be a whole number"),
        ({"global_batch_size": 9}, "global_batch_size is 9 (from the call), but train.batch_size 8 x"),
        ({"batch_size": True}, "batch_size must be a whole number, got true"),
        ({"model": {"attn_implementation": "sdpa"}}, "choose how a batch runs with model.attention"),
        ({"model": {"learning_rate": 1}}, "model.learning_rate is not a setting"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused(values: dict, message: str):
    assert message in error_of(**values)


@pytest.mark.parametrize(
    "name,method",
    [
        ("CPO", "cpo"),
        ("DPO", "dpo"),
        ("SimPO", "simpo"),
        ("CPOSimPO", "cpo-simpo"),
        ("CPO-SimPO", "cpo-simpo"),
        ("KTO", "kto"),
        ("Reward", "reward"),
    ],
)
@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_every_method_of_the_toolkit_goes_with_every_mode(name: str, method: str, mode: str):
    config = from_values({**base_of("sft", {}), "rlhf_type": name, "train_mode": mode}).config
    assert config.method == method
    assert (config.model.adapter is None) == (mode == "full")
    assert (config.model.quantization is not None) == (mode == "qlora")


def test_the_methods_of_the_toolkit_that_sample_are_methods_here():
    for name in ("PPO", "RLOO"):
        config = from_values({**base_of("grpo", {}), "rlhf_type": name}).config
        assert (config.method, config.credit, config.loss) == (name.lower(), None, {})
    assert "but the command is sft" in error_of("sft", rlhf_type="RLOO")
    assert "it must be PPO, RLOO, CPO, DPO" in error_of(rlhf_type="DPOO")


@pytest.mark.parametrize(
    "name,credit,loss",
    [
        ("grpo", "grpo", {}),
        ("gspo", "grpo", {"use": "gspo"}),
        ("reinforce_plus_plus", "reinforce_plus_plus", {}),
        ("reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline", {}),
        ("ppo", "gae", {}),
    ],
)
def test_estimators_are_credit_rules_or_losses(name: str, credit: str, loss: dict):
    config = read("grpo", advantage_estimator=name).config
    assert (config.credit.use, config.loss) == (credit, loss)
    assert method_of(config).credit[0].name == credit


def test_the_names_of_a_critic_go_with_its_estimator():
    names = {"critic_lr": 1e-5, "value_clip": 0.3, "num_critic_only_steps": 5, "gamma": 0.9, "lambd": 0.95}
    config = read("grpo", advantage_estimator="ppo", **names).config
    assert (config.critic.lr, config.critic.value_clip, config.critic.warmup_steps) == (1e-5, 0.3, 5)
    assert config.credit.options == {"gamma": 0.9, "lam": 0.95}
    assert "critic.lr is given, but" in error_of("grpo", critic_lr=1e-5)


def test_sampling_as_in_the_guide_to_dynamic_sampling_and_partial_rollout():
    path = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    names = {"rollout_batch_size": 32, "n_samples_per_prompt": 8, "over_sampling_batch_size": 64}
    names |= {"dynamic_sampling_filter_path": path, "partial_rollout": True}
    names |= {"mask_offpolicy_in_partial_rollout": True, "buffer_filter_path": "my.buffers.newest"}
    rollout = read("grpo", **names).config.rollout
    assert (rollout.oversampling, rollout.filter.use, rollout.partial) == (64, "nonzero_std", True)
    assert (rollout.mask_offpolicy, rollout.buffer.use) == (True, "my.buffers.newest")
    assert "rollout.oversampling is 16" in error_of("grpo", over_sampling_batch_size=16)
    assert "cannot be slime's check_no_aborted" in error_of(
        "grpo", dynamic_sampling_filter_path="slime.rollout.filter_hub.check_no_aborted"
    )


def test_corrections_have_their_limits():
    correction = read("grpo", use_tis=True, tis_clip=3.0, tis_clip_low=0.1).config.correction
    assert (correction.use, correction.limits) == ("tis", (0.1, 3.0))
    assert read("grpo", use_opsm=True, opsm_delta=0.01).config.correction.opsm == 0.01


def test_a_penalty_stands_in_the_loss_or_in_the_reward():
    in_loss = read("grpo", use_kl_loss=True, kl_loss_coef=0.01, kl_loss_type="k2", kl_coef=0).config.kl
    assert (in_loss.where, in_loss.coef, in_loss.type) == ("loss", 0.01, "k2")
    in_reward = read("grpo", kl_coef=0.01).config.kl
    assert (in_reward.where, in_reward.coef) == ("reward", 0.01)
    assert "kl.where is given twice" in error_of("grpo", use_kl_loss=True, kl_coef=0.1)


def test_a_rollout_function_is_a_mode_or_refused():
    path = "examples.fully_async.fully_async_rollout.generate_rollout_fully_async"
    assert read("grpo", rollout_function_path=path).config.rollout.mode == "async"
    assert "rollout.generate" in error_of("grpo", rollout_function_path="my.rollout")
    assert "must be a folder" in error_of("grpo", debug_train_only=True)


@pytest.mark.parametrize(
    "values,path,expected",
    [
        ({"loss_type": "cispo"}, "loss", {"use": "cispo"}),
        ({"loss_type": "sapo", "sapo_temperature_neg": 1.1}, "loss", {"use": "sapo", "tau_negative": 1.1}),
        ({"importance_sampling_level": "sequence"}, "loss", {"use": "gspo"}),
        ({"importance_sampling_level": "token"}, "loss", {}),
        ({"num_iterations": 4}, "rollout.num_ppo_epochs", 4),
        ({"num_ppo_epochs": 4}, "rollout.num_ppo_epochs", 4),
        ({"num_mini_batches": 2}, "rollout.optimizer_steps", 2),
        ({"mask_truncated_completions": True}, "shaping.mask_truncated", True),
        ({"reward_clip_range": [-5.0, 5.0]}, "shaping.clip", 5.0),
        ({"off_policy_mask_threshold": 0.5}, "correction.opsm", 0.5),
        ({"use_bias_correction_kl": True}, "kl.unbiased", True),
        ({"num_generations_eval": 4}, "eval.num_samples", 4),
        ({"log_completions": True}, "log.rollouts", "parquet"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "data.template_kwargs", {"enable_thinking": False}),
        ({"kl_estimator": "k1", "kl_coef": 0.05}, "kl.type", "k1"),
        ({"cliprange": 0.1}, "loss", {"clip_low": 0.1, "clip_high": 0.1}),
        ({"rloo_k": 4}, "rollout.group_size", 4),
        ({"response_length": 53}, "rollout.max_tokens", 53),
    ],
)
def test_what_trl_calls_the_settings_of_reinforcement_learning(values: dict, path: str, expected: Any):
    assert value_at(read("grpo", **values), path) == expected


def test_ppo_of_llamafactory_has_its_own_names():
    names = {"stage": "ppo", "reward_model": "rm", "ppo_epochs": 2, "ppo_score_norm": False}
    config = from_values({"model": "tiny", "data.train": "a", **names}).config
    assert (config.method, config.reward.options, config.rollout.num_ppo_epochs) == ("ppo", {"path": "rm"}, 2)


def test_ppo_of_trl_has_its_own_names():
    names = {"cliprange_value": 0.3, "lam": 0.9, "gamma": 1.0, "whiten_rewards": True, "vf_coef": 0.2}
    config = from_values(
        {"model": "tiny", "data.train": "a", "reward_model_path": "rm", "critic.shared": True, **names}, method="ppo"
    ).config
    assert (config.critic.value_clip, config.critic.coef, config.shaping.whiten) == (0.3, 0.2, True)
    assert (config.reward.use, config.reward.options) == ("model", {"path": "rm"})
    assert "must be a range around zero" in error_of("grpo", reward_clip_range=[-1, 2])


@pytest.mark.parametrize(
    "method,value,loss",
    [
        ("dpo", "sigmoid", {"use": "sigmoid"}),
        ("dpo", "aot_pair", {"use": "aot"}),
        ("cpo", "sigmoid", {"use": "cpo"}),
        ("cpo", "simpo", {"use": "simpo"}),
        ("kto", "apo_zero_unpaired", {"use": "apo_zero_unpaired"}),
        ("sft", "nll", {}),
        ("sft", "dft", {"use": "dft"}),
        ("grpo", "dapo", {"weight": "token"}),
        ("grpo", "dr_grpo", {"weight": "fixed_length"}),
    ],
)
def test_a_loss_type_means_what_it_means_to_the_method(method: str, value: str, loss: dict):
    assert read(method, loss_type=value).config.loss == loss


@pytest.mark.parametrize(
    "method,values,message",
    [
        ("cpo", {"loss_type": "hinge"}, "cannot be hinge: without a reference"),
        ("dpo", {"loss_type": "kto_pair"}, "use method kto"),
        ("kto", {"loss_type": "sigmoid"}, "on labelled completions there is kto"),
        ("grpo", {"loss_type": "luspo"}, "cannot be luspo; use grpo, dapo"),
        ("reward", {"loss_type": "sigmoid"}, "cannot be honoured by reward: it has one loss"),
        ("sft", {"beta": 0.1}, "cannot be honoured by sft: its loss has no beta"),
        ("kto", {"label_smoothing": 0.1}, "cannot be honoured by kto: its loss has none"),
        ("sft", {"val_size": 100}, "data.eval_share the share that 100 rows are"),
        ("sft", {"stage": "grpo"}, "must be pt, sft, rm"),
        ("sft", {"finetuning_type": "freeze"}, "model.freeze.layers"),
        ("grpo", {"scale_rewards": "batch"}, "rewards are scaled within a group"),
        ("sft", {"lr_scheduler_kwargs": {"power": 2}}, "can hold min_lr_rate alone"),
        ("grpo", {"eval_prompt_data": ["a", "b", "c"]}, "must be pairs of a name and a file"),
    ],
)
def test_values_that_a_method_cannot_honour_are_refused(method: str, values: dict, message: str):
    assert message in error_of(method, **values)


def test_pairs_of_a_name_and_a_file_are_sets_of_evaluation():
    config = read("grpo", eval_prompt_data=["aime-2024", "a.jsonl@[0:9]", "math", "m.jsonl"], eval_top_k=-1).config
    assert {name: one.path for name, one in config.eval.sets.items()} == {
        "aime_2024": "a.jsonl@[0:9]",
        "math": "m.jsonl",
    }
    assert config.eval.top_k == 0
    plain = {"model": "tiny", "data.train": "a", "reward": "math", "eval_prompt_data": "a.jsonl"}
    assert from_values(plain, method="grpo").config.data.eval == "a.jsonl"
    rows = {"model": "tiny", "data.train": "a", "eval_prompt_data": ["aime", "a.jsonl", "b", "b.jsonl"]}
    assert from_values(rows, method="sft").config.data.eval == ["a.jsonl", "b.jsonl"]
    assert "names a set twice" in error_of("grpo", eval_prompt_data=["a-1", "a", "a_1", "b"])


def test_beta_is_the_coefficient_of_the_penalty_in_reinforcement_learning():
    config = read("grpo", beta=0.04).config
    assert (config.kl.coef, config.loss) == (0.04, {})


def test_the_share_of_the_policy_goes_with_a_reference_that_moves():
    reference = read("dpo", sync_ref_model=True, ref_model_mixup_alpha=0.5).config.reference
    assert (reference.sync_steps, reference.sync_alpha) == (512, 0.5)


def test_the_stage_gives_way_to_a_loss_that_is_a_method_of_its_own():
    config = from_values({**base_of("sft", {}), "stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.5}).config
    assert (config.method, config.loss) == ("simpo", {"beta": 2.5})
    config = from_values({**base_of("sft", {}), "stage": "pt"}).config
    assert (config.method, config.data.train_on) == ("sft", "all")


def test_names_are_read_for_the_method_that_the_same_file_names_later():
    values = {**base_of("sft", {}), "loss_type": "sigmoid", "rlhf_type": "CPO"}
    assert from_values(values).config.loss == {"use": "cpo"}


def test_a_list_of_loss_types_is_a_mixture_and_its_sft_is_the_cross_entropy_of_the_chosen():
    mixed = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.3}
    loaded = read("dpo", **mixed, label_smoothing=0.1)
    config = loaded.config
    assert config.loss == {} and config.nll_coef == 1.0
    assert [(term.use, term.coef, term.options) for term in config.terms] == [
        ("sigmoid", 0.8, {"beta": 0.3, "label_smoothing": 0.1}),
        ("bco_pair", 0.2, {"beta": 0.3}),
    ]
    assert loaded.sources["terms"] == "loss_type in the call"


def test_the_upper_clip_follows_the_lower_unless_it_is_given():
    assert read("grpo", eps_clip=0.1).config.loss == {"clip_low": 0.1, "clip_high": 0.1}
    assert read("grpo", eps_clip=0.1, eps_clip_high=0.3).config.loss == {"clip_low": 0.1, "clip_high": 0.3}
    assert read("grpo", eps_clip=0.1, loss={"clip_high": 0.3}).config.loss == {"clip_low": 0.1, "clip_high": 0.3}


def test_the_samples_per_optimizer_step_must_agree_and_the_sum_is_shown():
    # 32 prompts x 8 completions in 4 steps: 64 per step.
    assert read("grpo", global_batch_size=64, num_steps_per_rollout=4).config.rollout.optimizer_steps == 4
    assert error_of("grpo", global_batch_size=64) == (
        "global_batch_size is 64 (from the call), but rollout.prompts_per_step 32 x rollout.group_size 8 / "
        "rollout.optimizer_steps 1 = 256; set rollout.optimizer_steps to 4, or leave this out"
    )
    assert "= 256; change one of them, or leave this out" in error_of("grpo", global_batch_size=100)


def test_a_loss_of_kl_that_is_off_contradicts_a_coefficient():
    assert "kl.coef is given twice" in error_of("grpo", use_kl_loss=False, kl_loss_coef=0.1)
    assert read("grpo", use_kl_loss=True, kl_loss_coef=0.1).config.kl.coef == 0.1


def test_a_flag_replaces_the_same_name_in_the_file(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("model: tiny\ntrain_file: a\nbf16: true\nuse_lora: true\nlora_r: 4\neps_clip_high: 0.3\n")
    loaded = load("sft", str(path), ["--bf16", "false", "--use_lora", "false", "--eps-clip", "0.1"])
    config = loaded.config
    assert (config.backend.precision, config.model.adapter) == ("float32", None)
    assert config.loss == {"clip_low": 0.1, "clip_high": 0.3}
    assert loaded.sources["loss.clip_high"] == f"eps_clip_high in {path}, line 6"


def test_families_of_engine_options_are_refused_by_their_beginning():
    for prefix in [prefix for prefix, family in PREFIXES.items() if family.effect == "refused"]:
        assert f"{prefix}anything is 1 (from the call), but it is refused" in error_of(**{f"{prefix}anything": 1})
