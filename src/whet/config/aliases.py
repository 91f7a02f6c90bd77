"""Names that people bring from other tools: one table that says which settings each of them stands for.

A name either sets settings, or has no effect here and says why, or is refused with the reason. Names are
kept with underscores; `--learning-rate` and `--learning_rate` are alike.
"""

from __future__ import annotations

from collections.abc import Mapping

from whet.config import conversions as read
from whet.config.conversions import Alias, checked, converted, idle, refused, renamed

_HF = ("Hugging Face",)
_SFT = ("SFT trainer",)
_TOOLKIT = ("RLHF toolkit",)
_SLIME = ("slime",)
ORIGINS = (*_HF, *_SFT, *_TOOLKIT, *_SLIME)

_ONE_DEVICE = "this version trains and samples in one process on one device"
_NO_PARALLEL = "this version trains on one device; models are not split over several"
_FILTERED = "groups are not filtered while they are sampled in this version; leave it out"
_LEFT_OVER = (
    "every completion is finished in the step that began it in this version, so nothing is left over; leave it out"
)
_RECOMPUTE = "use backend.activation_checkpointing: true"
_DISTILLATION = "distillation is not in this version, which trains with sft and grpo"

_ALL = [
    renamed(_HF + _TOOLKIT, "model_name_or_path", "model.path"),
    renamed(_SFT, "model_name", "model.path"),
    renamed(_SLIME, "hf_checkpoint", "model.path"),
    converted(_SFT, "experiment_name", "output_dir", read.experiment, "`name` becomes `runs/name`"),
    idle(_SFT, "model_type", "the architecture is read from the model's own config.json", only=None),
    converted(_SFT, "device", "backend.device", read.device, "null is `auto`, `cuda:0` is `cuda`"),
    renamed(_SLIME, "save", "output_dir"),
    # Data
    renamed(_SFT, "train_file", "data.train"),
    renamed(_SFT, "eval_file", "data.eval"),
    renamed(_SLIME, "prompt_data", "data.train"),
    renamed(_SLIME, "eval_prompt_data", "data.eval"),
    renamed(_SLIME, "input_key", "data.columns.prompt"),
    renamed(_SLIME, "label_key", "data.columns.label"),
    renamed(_SLIME, "rollout_shuffle", "data.shuffle"),
    renamed(_SLIME, "rollout_max_prompt_len", "data.max_prompt_length"),
    converted(_SLIME, "apply_chat_template", "data.chat", read.chat, "true is `always`, false is `never`", switch=True),
    renamed(_SFT, "prompt_template", "data.prompt_template"),
    renamed(_SFT, "response_template", "data.response_template"),
    renamed(_SFT, "max_seq_length", "data.max_length"),
    renamed(_HF, "max_length", "data.max_length"),
    idle(
        _HF,
        "packing",
        "rows never see each other, however they are laid out (model.attention), so the result is the same either way",
    ),
    # Length and batches
    renamed(_SFT, "batch_size", "train.batch_size"),
    renamed(_HF, "per_device_train_batch_size", "train.batch_size"),
    renamed(_HF, "per_device_eval_batch_size", "eval.batch_size"),
    renamed(_HF + _SFT, "gradient_accumulation_steps", "train.accumulation"),
    renamed(_HF + _SFT, "num_train_epochs", "train.epochs"),
    converted(_HF, "max_steps", "train.steps", read.max_steps, "-1 is null"),
    renamed(_SLIME, "num_rollout", "train.steps"),
    renamed(_SLIME, "num_epoch", "train.epochs"),
    # Optimizer
    renamed(_HF + _SFT, "learning_rate", "optim.lr"),
    renamed(_SLIME, "lr", "optim.lr"),
    renamed(_HF + _SFT, "weight_decay", "optim.weight_decay"),
    renamed(_HF + _SFT + _SLIME, "adam_beta1", "optim.beta1"),
    renamed(_HF + _SFT + _SLIME, "adam_beta2", "optim.beta2"),
    renamed(_HF + _SFT, "adam_epsilon", "optim.eps"),
    renamed(_SLIME, "adam_eps", "optim.eps"),
    renamed(_HF + _SFT, "max_grad_norm", "optim.max_grad_norm"),
    renamed(_SLIME, "clip_grad", "optim.max_grad_norm"),
    converted(_HF, "lr_scheduler_type", "optim.schedule", read.scheduler, "`constant_with_warmup` is `constant`"),
    renamed(_SLIME, "lr_decay_style", "optim.schedule"),
    renamed(_HF, "warmup_ratio", "optim.warmup_ratio"),
    renamed(_SFT, "warmup_steps_ratio", "optim.warmup_ratio"),
    renamed(_HF, "warmup_steps", "optim.warmup_steps"),
    idle(_SLIME, "optimizer", "AdamW is the optimizer", only=("adam", "adamw")),
    # Precision and memory
    converted(
        _SFT,
        "use_amp",
        "backend.precision",
        read.precision("bf16"),
        "true is `bf16`, false `float32`",
        switch=True,
        check=read.not_precision("bf16", "fp16"),
    ),
    converted(
        _HF,
        "bf16",
        "backend.precision",
        read.precision("bf16"),
        "true is `bf16`; false is `float32` unless `fp16` is true",
        switch=True,
        check=read.not_precision("bf16"),
    ),
    converted(
        _HF,
        "fp16",
        "backend.precision",
        read.precision("fp16"),
        "true is `fp16`; false is `float32` unless `bf16` is true",
        switch=True,
        check=read.not_precision("fp16"),
    ),
    renamed(_HF, "gradient_checkpointing", "backend.activation_checkpointing"),
    renamed(_SFT, "use_gradient_checkpointing", "backend.activation_checkpointing"),
    renamed(_SLIME, "max_tokens_per_gpu", "backend.max_tokens_per_device"),
    idle(_SLIME, "use_dynamic_batch_size", "micro-batches are always cut by their tokens, without changing the loss"),
    idle(_SLIME, "balance_data", "there is one device, so nothing to balance"),
    converted(
        _HF,
        "load_in_4bit",
        "model.quantization.bits",
        read.load_in(4),
        "true is 4",
        switch=True,
        check=read.not_load_in(4),
    ),
    converted(
        _HF,
        "load_in_8bit",
        "model.quantization.bits",
        read.load_in(8),
        "true is 8",
        switch=True,
        check=read.not_load_in(8),
    ),
    renamed(_HF, "bnb_4bit_quant_type", "model.quantization.type", "makes quantised weights"),
    renamed(_HF, "bnb_4bit_use_double_quant", "model.quantization.double", "makes quantised weights"),
    renamed(_HF, "bnb_4bit_compute_dtype", "model.quantization.compute_dtype", "makes quantised weights"),
    refused(
        _HF, "attn_implementation", "attention is whet's own; choose how a batch runs with model.attention", off=(None,)
    ),
    # Adapters and frozen layers
    converted(
        _SFT,
        "use_lora",
        "model.adapter model.adapter.type",
        read.use_lora,
        "true is an adapter, false is `model.adapter: null`",
        switch=True,
    ),
    renamed(_SFT, "lora_rank", "model.adapter.rank", "makes an adapter, with or without `use_lora`"),
    renamed(_HF, "lora_r", "model.adapter.rank", "makes an adapter"),
    renamed(_HF + _SFT, "lora_alpha", "model.adapter.alpha", "makes an adapter"),
    renamed(_HF + _SFT, "lora_dropout", "model.adapter.dropout", "makes an adapter"),
    renamed(_HF + _SFT, "lora_target_modules", "model.adapter.target_modules", "makes an adapter"),
    converted(
        _HF,
        "use_rslora",
        "model.adapter.rslora",
        read.variant("rslora"),
        "true makes an adapter",
        switch=True,
        check=read.not_variant("rslora"),
    ),
    converted(
        _HF,
        "use_dora",
        "model.adapter.dora",
        read.variant("dora"),
        "true makes an adapter",
        switch=True,
        check=read.not_variant("dora"),
    ),
    converted(
        _HF,
        "init_lora_weights",
        "model.adapter.init",
        read.init_lora_weights,
        "true is `default`; makes an adapter",
        switch=True,
    ),
    converted(_SFT, "freeze_layers", "model.freeze.layers", read.freeze_layers, "null is 0"),
    converted(
        _TOOLKIT,
        "train_mode",
        "model.adapter model.adapter.type model.quantization.bits",
        read.train_mode,
        "`full` is no adapter, `lora` is one, `qlora` one on weights of 4 bits",
    ),
    # Evaluation, checkpoints, log
    renamed(_HF, "logging_steps", "log.every_steps"),
    converted(
        _HF,
        "report_to",
        "log.tensorboard",
        read.report_to,
        "`tensorboard`, `all` or `none`; metrics.jsonl is always written",
    ),
    renamed(_HF, "save_steps", "checkpoint.every_steps"),
    renamed(_SLIME, "save_interval", "checkpoint.every_steps"),
    converted(
        _HF,
        "save_strategy",
        "checkpoint.every_steps checkpoint.every_epochs",
        read.when("checkpoint", {"checkpoint.every_steps": None, "checkpoint.every_epochs": None}),
        "`epoch` is 1; `steps` leaves it to `save_steps`",
    ),
    renamed(_HF, "save_total_limit", "checkpoint.keep"),
    renamed(_HF, "load_best_model_at_end", "checkpoint.best"),
    converted(_HF, "resume_from_checkpoint", "checkpoint.resume", read.resume, "null leaves `auto`", switch=True),
    refused(
        _SLIME,
        "load",
        "a run goes on by itself from the newest checkpoint in output_dir; for another use checkpoint.resume",
        off=(None,),
    ),
    refused(_SLIME, "ref_load", "the reference is the model at model.path as it was before training", off=(None,)),
    renamed(_HF, "eval_steps", "eval.every_steps"),
    renamed(_SLIME, "eval_interval", "eval.every_steps"),
    converted(
        _HF,
        "eval_strategy",
        "eval.every_steps eval.every_epochs eval.at_end",
        read.when("eval", {"eval.every_steps": None, "eval.every_epochs": None, "eval.at_end": False}),
        "`epoch` is 1; `steps` leaves it to `eval_steps`; `no` turns evaluation off",
    ),
    converted(_HF, "metric_for_best_model", "eval.metric", read.metric, "`loss` and `eval_loss` are `eval/loss`"),
    converted(
        _HF, "greater_is_better", "eval.mode", read.greater_is_better, "true is `max`, false is `min`", switch=True
    ),
    renamed(_HF, "early_stopping_patience", "eval.patience"),
    renamed(_SLIME, "n_samples_per_eval_prompt", "eval.num_samples"),
    renamed(_SLIME, "eval_max_response_len", "eval.max_tokens"),
    renamed(_SLIME, "eval_temperature", "eval.temperature"),
    renamed(_SLIME, "eval_top_p", "eval.top_p"),
    # Reinforcement learning
    converted(
        _TOOLKIT,
        "rlhf_type",
        "method credit.use loss.use",
        read.rlhf_type,
        "`RLOO` is grpo with credit rloo; others are refused",
    ),
    renamed(_SLIME, "rollout_batch_size", "rollout.prompts_per_step"),
    renamed(_SLIME, "n_samples_per_prompt", "rollout.group_size"),
    renamed(_SLIME, "num_steps_per_rollout", "rollout.optimizer_steps"),
    checked(
        _SLIME,
        "global_batch_size",
        "must be `rollout.prompts_per_step` x `rollout.group_size` / `rollout.optimizer_steps`",
        read.global_batch_size,
    ),
    renamed(_SLIME, "rollout_max_response_len", "rollout.max_tokens"),
    renamed(_SLIME, "rollout_temperature", "rollout.temperature"),
    renamed(_SLIME, "rollout_top_p", "rollout.top_p"),
    converted(_SLIME, "rollout_top_k", "rollout.top_k", read.top_k, "-1 is 0"),
    renamed(_SLIME, "rollout_stop", "rollout.stop"),
    renamed(_SLIME, "rollout_stop_token_ids", "rollout.stop_token_ids"),
    converted(_SLIME, "advantage_estimator", "credit.use", read.estimator, "`grpo`, `grpo_no_std` or `rloo`"),
    converted(
        _SLIME,
        "use_kl_loss",
        "kl.coef",
        read.use_kl_loss,
        "false is `kl.coef: 0`; true leaves it to `kl_loss_coef`",
        switch=True,
    ),
    renamed(_SLIME, "kl_loss_coef", "kl.coef"),
    renamed(_SLIME, "kl_loss_type", "kl.type"),
    converted(
        _SLIME,
        "eps_clip",
        "loss.clip_low loss.clip_high",
        read.eps_clip,
        "the upper limit too, unless `eps_clip_high` is given",
    ),
    renamed(_SLIME, "eps_clip_high", "loss.clip_high"),
    renamed(_SLIME, "rm_type", "reward.use"),
    renamed(_SLIME, "custom_rm_path", "reward.use", "a reward of your own, `async (episode) -> float`"),
    refused(_SLIME, "over_sampling_batch_size", _FILTERED),
    refused(_SLIME, "dynamic_sampling_filter_path", _FILTERED),
    refused(_SLIME, "partial_rollout", _LEFT_OVER),
    refused(_SLIME, "buffer_filter_path", _LEFT_OVER),
    idle(_SLIME, "colocate", "engine and trainer share the device and the weights anyway", only=(True,)),
    idle(_SLIME, "actor_num_nodes", _ONE_DEVICE, only=(1,)),
    idle(_SLIME, "actor_num_gpus_per_node", _ONE_DEVICE, only=(1,)),
    idle(_SLIME, "rollout_num_gpus_per_engine", _ONE_DEVICE, only=(1,)),
    refused(_SLIME, "rollout_num_gpus", f"{_ONE_DEVICE}; leave it out"),
    idle(_SLIME, "tensor_model_parallel_size", _NO_PARALLEL, only=(1,)),
    idle(_SLIME, "pipeline_model_parallel_size", _NO_PARALLEL, only=(1,)),
    idle(_SLIME, "context_parallel_size", _NO_PARALLEL, only=(1,)),
    idle(_SLIME, "expert_model_parallel_size", _NO_PARALLEL, only=(1,)),
    idle(_SLIME, "expert_tensor_parallel_size", _NO_PARALLEL, only=(1,)),
    refused(_SLIME, "sequence_parallel", f"{_NO_PARALLEL}; leave it out"),
    refused(_SLIME, "recompute_granularity", _RECOMPUTE, off=(None,)),
    refused(_SLIME, "recompute_method", _RECOMPUTE, off=(None,)),
    refused(_SLIME, "recompute_num_layers", _RECOMPUTE, off=(None,)),
    # Distillation
    refused(_TOOLKIT, "teacher_model_name_or_path", _DISTILLATION),
    refused(_TOOLKIT, "lmbda", _DISTILLATION),
    refused(_TOOLKIT, "seq_kd", _DISTILLATION),
    refused(
        _TOOLKIT,
        "beta",
        "preference losses and distillation are not in this version; the penalty of grpo is kl.coef",
        off=(None,),
    ),
]

ALIASES: Mapping[str, Alias] = {alias.name: alias for alias in _ALL}
"""Every name by itself."""

_PASSED_THROUGH = "engines beside the embedded one are not in this version; sampling is set under rollout and engine"
PREFIXES: Mapping[str, Alias] = {
    alias.name: alias
    for alias in [
        refused(_SLIME, "sglang_", _PASSED_THROUGH, off=()),
        refused(_SLIME, "vllm_", _PASSED_THROUGH, off=()),
        refused(_SLIME, "megatron_", f"{_NO_PARALLEL}, and Megatron is not used", off=()),
    ]
}
"""Whole families of names, by how they begin."""


def alias_of(path: tuple[str | int, ...]) -> Alias | None:
    """The alias that a name stands for.

    At the top all are known; inside a section, those whose settings all lie in it, and those that have none.
    """
    *section, name = map(str, path)
    alias = ALIASES.get(name) or next((family for prefix, family in PREFIXES.items() if name.startswith(prefix)), None)
    if alias is None or not section:
        return alias
    inside = ".".join(section) + "."
    return alias if all(target.startswith(inside) for target in alias.targets) else None
