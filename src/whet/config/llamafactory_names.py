"""LLaMA-Factory's own names, and what becomes of each. Its data sets are read by `whet import` alone."""

from __future__ import annotations

from whet.config import conversions as read
from whet.config.conversions import Converted, Refused, Unless, by_method, converted, idle, refused, renamed

_FACTORY = ("LLaMA-Factory",)

_STAGES = {"sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto", "ppo": "ppo"}
_NOT_HERE = "this version has no such thing; leave it out"
_OPTIMIZER = "AdamW is the optimizer"
_SPEED = "it changes how fast tokens are computed, not what"
_TOKENISED = "rows are tokenised once and kept by content (data.cache_dir)"
_TEMPLATE = (
    "the model's own chat template is used (model.chat_template for another); compare what `whet check` shows of a row"
)


def _stage(value: object) -> Converted:
    if value == "pt":
        return {"method": Unless("sft"), "data.train_on": "all"}
    if not isinstance(value, str) or value not in _STAGES:
        raise Refused(f"must be pt, {', '.join(_STAGES)}")
    return {"method": Unless(_STAGES[value])}


def _reward_model(value: object) -> Converted:
    return {} if value is None else {"reward.use": "model", "reward.path": value}


def _pref_loss(value: object) -> Converted:
    if value in ("orpo", "simpo"):
        return {"method": value}
    if value == "kto_pair":
        raise Refused("cannot be kto_pair: use method kto, which reads pairs as well")
    return {"loss.use": value}


def _finetuning_type(value: object) -> Converted:
    if value in ("freeze", "oft"):
        raise Refused(
            f"cannot be {value} by itself: freeze layers with model.freeze.layers (which counts those kept, from the "
            "first), or use lora or full"
        )
    return read.use_lora({"lora": True, "full": False}.get(str(value), value))


def _lora_target(value: object) -> Converted:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    return {"model.adapter.target_modules": "all-linear" if names == ["all"] else names}


def _pissa_iter(value: object) -> Converted:
    return {"model.adapter.init": "pissa" if value == -1 else f"pissa_niter_{value}"}


def _val_size(value: object) -> Converted:
    if isinstance(value, int | float) and value >= 1:
        raise Refused(f"cannot be a number of rows: give data.eval_share the share that {value:g} rows are of the data")
    return {"data.eval_share": value}


def _opposite(target: str, on: object, off: object):
    return lambda value: {target: on if read.switch(value) else off}


FACTORY_NAMES = [
    converted(
        _FACTORY,
        "stage",
        "method data.train_on",
        _stage,
        "`rm` is `reward`, `pt` is `sft` with `data.train_on: all`; unless `pref_loss` is a method of its own",
    ),
    converted(_FACTORY, "pref_loss", "loss.use method", _pref_loss, "`orpo` and `simpo` are methods"),
    renamed(_FACTORY, "pref_beta", "loss.beta"),
    renamed(_FACTORY, "pref_ftx", "nll_coef"),
    by_method(
        "dpo_label_smoothing",
        {("dpo",): renamed(_FACTORY, "", "loss.label_smoothing")},
        "its loss has none; leave it out",
    ),
    renamed(_FACTORY, "kto_chosen_weight", "loss.desirable_weight"),
    renamed(_FACTORY, "kto_rejected_weight", "loss.undesirable_weight"),
    renamed(_FACTORY, "ref_model", "reference.path"),
    refused(_FACTORY, "ref_model_adapters", "give reference.path a merged model (whet merge)", off=(None,)),
    refused(_FACTORY, "ref_model_quantization_bit", "a reference beside the policy is not quantised", off=(None,)),
    converted(
        _FACTORY, "reward_model", "reward.use reward.path", _reward_model, "the reward `model` with that folder, merged"
    ),
    idle(_FACTORY, "reward_model_type", "the reward is the model at reward.path", only=("lora", "full")),
    renamed(_FACTORY, "ppo_epochs", "rollout.num_ppo_epochs"),
    renamed(_FACTORY, "ppo_whiten_rewards", "shaping.whiten", "advantages are whitened, over the global batch"),
    idle(_FACTORY, "ppo_score_norm", "rewards stay as they are; see shaping.scale", only=(False, None)),
    idle(_FACTORY, "ppo_buffer_size", "rollout.prompts_per_step prompts make a step", only=None),
    idle(_FACTORY, "ppo_target", "kl.coef stays as it is", only=None),
    # Adapters and weights
    converted(
        _FACTORY,
        "finetuning_type",
        "model.adapter model.adapter.type",
        _finetuning_type,
        "`lora` is an adapter, `full` is `model.adapter: null`",
    ),
    converted(_FACTORY, "lora_target", "model.adapter.target_modules", _lora_target, "`all` is `all-linear`"),
    converted(
        _FACTORY,
        "pissa_init",
        "model.adapter.init",
        lambda value: {"model.adapter.init": Unless("pissa_niter_16")} if read.switch(value) else {},
        "true is `pissa_niter_16` unless `pissa_iter` is given",
        switch=True,
    ),
    converted(_FACTORY, "pissa_iter", "model.adapter.init", _pissa_iter, "N is `pissa_niter_N`, -1 is `pissa`"),
    refused(_FACTORY, "pissa_convert", "the adapter is saved as it is, with its own weights beneath (whet merge)"),
    refused(_FACTORY, "additional_target", "an adapter trains its own weights and a score head only", off=(None,)),
    refused(_FACTORY, "loraplus_lr_ratio", "both matrices of an adapter have one rate", off=(None,)),
    refused(
        _FACTORY,
        "adapter_name_or_path",
        "to train on with an adapter give its folder as model.path; for a new one on top merge it first (whet merge)",
        off=(None,),
    ),
    refused(_FACTORY, "create_new_adapter", "an adapter begins anew; merge the old one first (whet merge)"),
    refused(_FACTORY, "freeze_trainable_layers", "count the layers kept in model.freeze.layers instead", off=(None,)),
    refused(_FACTORY, "freeze_trainable_modules", "name what is kept in model.freeze.patterns", off=(None, "all")),
    converted(
        _FACTORY,
        "quantization_bit",
        "model.quantization.bits",
        lambda value: {} if value is None else {"model.quantization.bits": value},
        "null is none",
    ),
    renamed(_FACTORY, "quantization_type", "model.quantization.type"),
    renamed(_FACTORY, "double_quantization", "model.quantization.double"),
    idle(_FACTORY, "quantization_method", "bitsandbytes quantises", only=("bitsandbytes", "bnb")),
    converted(
        _FACTORY,
        "pure_bf16",
        "model.dtype backend.precision",
        lambda value: {"model.dtype": "bfloat16", "backend.precision": "bf16"} if read.switch(value) else {},
        "true is `bfloat16` weights and `bf16` arithmetic",
        switch=True,
    ),
    converted(
        _FACTORY,
        "disable_gradient_checkpointing",
        "backend.activation_checkpointing",
        _opposite("backend.activation_checkpointing", False, True),
        "the opposite",
        switch=True,
    ),
    # Data
    renamed(_FACTORY, "cutoff_len", "data.max_length"),
    converted(_FACTORY, "val_size", "data.eval_share", _val_size, "a share below 1; a number of rows is refused"),
    renamed(_FACTORY, "default_system", "data.system"),
    renamed(_FACTORY, "enable_thinking", "data.template_kwargs.enable_thinking"),
    converted(
        _FACTORY,
        "train_on_prompt",
        "data.train_on",
        _opposite("data.train_on", "all", "completion"),
        "true is `all`, false is `completion`",
        switch=True,
    ),
    converted(
        _FACTORY,
        "disable_shuffling",
        "data.shuffle",
        _opposite("data.shuffle", False, True),
        "the opposite",
        switch=True,
    ),
    refused(_FACTORY, "mask_history", "every assistant turn is trained; keep only the last one in the rows"),
    idle(_FACTORY, "template", _TEMPLATE, only=None),
    idle(_FACTORY, "neat_packing", "rows never see each other, however they are laid out"),
    idle(_FACTORY, "mix_strategy", "files are read as one", only=("concat",)),
    refused(_FACTORY, "interleave_probs", "files are read as one, each row once per epoch", off=(None,)),
    refused(_FACTORY, "streaming", "rows are prepared before the first step and kept on disk; leave it out"),
    refused(_FACTORY, "tokenized_path", f"{_TOKENISED}; leave it out", off=(None,)),
    idle(_FACTORY, "overwrite_cache", _TOKENISED, only=None),
    idle(_FACTORY, "preprocessing_num_workers", _TOKENISED, only=None),
    idle(_FACTORY, "preprocessing_batch_size", _TOKENISED, only=None),
    idle(_FACTORY, "media_dir", "models read text", only=None),
    # Everything else
    idle(_FACTORY, "flash_attn", "attention is whet's own (model.attention)", only=None),
    idle(_FACTORY, "use_unsloth", _SPEED),
    idle(_FACTORY, "use_unsloth_gc", _SPEED),
    idle(_FACTORY, "enable_liger_kernel", _SPEED),
    idle(_FACTORY, "low_cpu_mem_usage", _SPEED),
    idle(_FACTORY, "use_fast_tokenizer", "the tokenizer is the model's own"),
    idle(_FACTORY, "upcast_layernorm", "weights have one type, model.dtype", only=(False, None)),
    idle(_FACTORY, "plot_loss", "TensorBoard draws the curves (log.tensorboard)"),
    idle(_FACTORY, "include_num_input_tokens_seen", "num_tokens is always in metrics.jsonl", only=None),
    idle(_FACTORY, "compute_accuracy", "mean_token_accuracy is always in metrics.jsonl"),
    idle(_FACTORY, "predict_with_generate", "whet eval shows completions", only=(False, None)),
    idle(_FACTORY, "freeze_vision_tower", "models read text"),
    idle(_FACTORY, "freeze_multi_modal_projector", "models read text"),
    *(
        refused(_FACTORY, name, f"{why}; leave it out")
        for why, names in {
            _OPTIMIZER: ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon"),
            "this version writes TensorBoard files and metrics.jsonl (always)": ("use_swanlab",),
            "the model and its vocabulary are taken as they are": (
                *("resize_vocab", "shift_attn", "use_llama_pro", "train_from_scratch"),
            ),
        }.items()
        for name in names
    ),
    refused(_FACTORY, "add_tokens", f"the vocabulary is taken as it is; {_NOT_HERE}", off=(None,)),
    refused(_FACTORY, "new_special_tokens", f"the vocabulary is taken as it is; {_NOT_HERE}", off=(None,)),
    refused(_FACTORY, "rope_scaling", "it stands in the model's own config.json; change it there", off=(None,)),
    refused(_FACTORY, "moe_aux_loss_coef", _NOT_HERE, off=(None,)),
]
