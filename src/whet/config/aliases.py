"""Names that people bring from other tools: one table that says which settings each of them stands for.

A name either sets settings, or has no effect here and says why, or is refused with the reason. Names are
kept with underscores; `--learning-rate` and `--learning_rate` are alike.
"""

from __future__ import annotations

from collections.abc import Mapping

from whet.config import conversions as read
from whet.config.conversions import Alias, converted, idle, refused, renamed
from whet.config.llamafactory_names import FACTORY_NAMES
from whet.config.passthrough import passed_through
from whet.config.process_names import PROCESS_NAMES
from whet.config.slime_names import SLIME_FAMILIES, SLIME_NAMES
from whet.config.trl_names import TRL_NAMES

_HF = ("Hugging Face",)
_SFT = ("SFT trainer",)
_TOOLKIT = ("RLHF toolkit",)
_SLIME = ("slime",)
ORIGINS = (*_HF, "accelerate", "torchrun", "TRL", "LLaMA-Factory", *_SFT, *_TOOLKIT, *_SLIME)

_NO_HUB = "nothing is sent anywhere"
_KERNELS = "it changes how fast tokens are computed, not what"
_LOADING = "rows are prepared before the first step and kept on disk (data.cache_dir)"

_ALL = [
    renamed(_HF + _TOOLKIT, "model_name_or_path", "model.path"),
    renamed(_SFT, "model_name", "model.path"),
    converted(_SFT, "experiment_name", "output_dir", read.experiment, "`name` becomes `runs/name`"),
    idle(_SFT, "model_type", "the architecture is read from the model's own config.json", only=None),
    converted(_SFT, "device", "backend.device", read.device, "null is `auto`, `cuda:0` is `cuda`"),
    # Data
    renamed(_SFT, "train_file", "data.train"),
    renamed(_SFT, "eval_file", "data.eval"),
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
    # Optimizer
    renamed(_HF + _SFT, "learning_rate", "optim.lr"),
    renamed(_HF + _SFT, "weight_decay", "optim.weight_decay"),
    renamed(_HF + _SFT + _SLIME, "adam_beta1", "optim.beta1"),
    renamed(_HF + _SFT + _SLIME, "adam_beta2", "optim.beta2"),
    renamed(_HF + _SFT, "adam_epsilon", "optim.eps"),
    renamed(_HF + _SFT, "max_grad_norm", "optim.max_grad_norm"),
    converted(_HF, "lr_scheduler_type", "optim.schedule", read.scheduler, "`constant_with_warmup` is `constant`"),
    renamed(_HF, "warmup_ratio", "optim.warmup_ratio"),
    renamed(_SFT, "warmup_steps_ratio", "optim.warmup_ratio"),
    converted(
        _HF,
        "warmup_steps",
        "optim.warmup_steps optim.warmup_ratio",
        read.warmup_steps,
        "a number below 1 is a share of all steps",
    ),
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
    renamed(_HF, "eval_steps", "eval.every_steps"),
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
    # The toolkit's choice of a method; its other names are TRL's
    converted(
        _TOOLKIT,
        "rlhf_type",
        "method",
        read.rlhf_type,
        "`CPOSimPO` is cpo-simpo",
    ),
    # What else all of Hugging Face's trainers take
    renamed(_HF, "eval_on_start", "eval.at_start"),
    renamed(_HF, "label_smoothing_factor", "loss.label_smoothing"),
    converted(_HF, "lr_scheduler_kwargs", "optim.min_lr_ratio", read.scheduler_kwargs, "`min_lr_rate` alone"),
    converted(_HF, "tf32", "backend.matmul", read.tf32, "true is `high`, false is `highest`", switch=True),
    converted(_HF, "use_cpu", "backend.device", read.use_cpu, "true is `cpu`", switch=True),
    refused(_HF, "neftune_noise_alpha", "nothing is added to embeddings in this version; leave it out", off=(None,)),
    refused(_HF, "push_to_hub", f"{_NO_HUB}; upload output_dir yourself (hf upload)"),
    refused(_HF, "torch_compile", "models are not compiled in this version; leave it out"),
    refused(
        _HF,
        "auto_find_batch_size",
        "lower backend.max_tokens_per_device where memory runs out: it changes nothing else",
    ),
    idle(_HF, "save_only_model", "a checkpoint is what a run goes on from, so it holds everything", only=(False, None)),
    *(
        idle(_HF, name, why, only=None)
        for why, names in {
            _KERNELS: ("gradient_checkpointing_kwargs", "torch_empty_cache_steps", "use_cache"),
            "what is logged stands in metrics.jsonl": (
                *("logging_first_step", "logging_strategy", "logging_dir", "logging_nan_inf_filter", "log_level"),
                *("disable_tqdm", "run_name", "project", "include_tokens_per_second", "skip_memory_metrics"),
            ),
            "the command says what is done": ("do_train", "do_eval", "do_predict"),
            "output_dir is gone on with where it holds a checkpoint (checkpoint.resume)": ("overwrite_output_dir",),
            "columns that a method does not read are left alone": ("remove_unused_columns", "label_names"),
            "losses are means over the tokens of the whole batch": ("average_tokens_across_devices",),
            "seed orders the data too": ("data_seed",),
            "it is part of how several processes work together": ("local_rank", "accelerator_config"),
        }.items()
        for name in names
    ),
    *PROCESS_NAMES,
    *TRL_NAMES,
    *FACTORY_NAMES,
    *SLIME_NAMES,
]

ALIASES: Mapping[str, Alias] = {alias.name: alias for alias in _ALL}
"""Every name by itself."""

PREFIXES: Mapping[str, Alias] = {
    alias.name: alias
    for alias in [
        *SLIME_FAMILIES,
        idle(_HF, "dataloader_", _LOADING, only=None),
        idle(_HF, "ddp_", "it is part of how several processes work together", only=None),
        idle(_HF, "hub_", _NO_HUB, only=None),
        idle(("LLaMA-Factory",), "swanlab_", "metrics.jsonl and TensorBoard files are written", only=None),
    ]
}
"""Whole families of names, by how they begin."""


def alias_of(path: tuple[str | int, ...]) -> Alias | None:
    """The alias that a name stands for.

    At the top all are known; inside a section, those whose settings all lie in it, and those that have none.
    """
    *section, name = map(str, path)
    alias = ALIASES.get(name) or passed_through(path)
    alias = alias or next((family for prefix, family in PREFIXES.items() if name.startswith(prefix)), None)
    if alias is None or not section:
        return alias
    inside = ".".join(section) + "."
    return alias if all(target.startswith(inside) for target in alias.targets) else None
