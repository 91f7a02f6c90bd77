"""TRL's names beside those that all of Hugging Face's trainers share, and what becomes of each.

Some mean different things to different trainers: `beta` and `loss_type` most of all.
"""

from __future__ import annotations

from whet.config import conversions as read
from whet.config.conversions import Converted, Refused, Unless, by_method, converted, idle, of_credit, refused, renamed
from whet.config.rules import DISTILLS, REINFORCES

_TRL = ("TRL",)
_TOOLKIT = ("RLHF toolkit",)
_BOTH = (*_TRL, *_TOOLKIT)
_REFERENCED = ("dpo", "apo")
_ALONE = ("cpo", "cpo-simpo", "simpo")
_LABELLED = ("kto", "bco")

PAIR_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
)
"""Values of DPO's `loss_type` that are called the same here."""
_DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha"}
_NOT_HERE = "this version has no such thing; leave it out"
_SAMPLING = "sampling is set under rollout and engine"
_SPEED = "it changes how fast tokens are computed, not what"


def _pair_loss(value: object) -> Converted:
    uses = [_renamed_loss(one) for one in value] if isinstance(value, list) else _renamed_loss(value)
    return {"loss.use": uses}


def _renamed_loss(value: object) -> object:
    """`aot_pair` and `kto_pair` are what earlier versions called aot, and an unpaired loss on pairs."""
    if value == "kto_pair":
        raise Refused("cannot be kto_pair: use method kto, which reads pairs as well")
    return {"aot_pair": "aot"}.get(str(value), value)


def _reference_free(value: object) -> Converted:
    if value in ("sigmoid", "simpo"):
        return {"loss.use": "cpo" if value == "sigmoid" else "simpo"}
    raise Refused(f"cannot be {value}: without a reference there is sigmoid (`cpo`) and simpo; use one of them")


def _labelled(value: object) -> Converted:
    if value not in ("kto", "apo_zero_unpaired", "bco"):
        raise Refused(f"cannot be {value}: on labelled completions there is kto, apo_zero_unpaired and bco")
    return {"loss.use": value}


def _supervised(value: object) -> Converted:
    if value in ("nll", "chunked_nll"):
        return {}
    return {"loss.use": value}


_POLICY_WEIGHTS = {"grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "fixed_length"}


_POLICY_LOSSES = ("cispo", "sapo")
"""Values of GRPO's `loss_type` that are losses of their own."""


def _policy_loss(value: object) -> Converted:
    if value in _POLICY_LOSSES:
        return {"loss.use": value}
    if not isinstance(value, str) or value not in _POLICY_WEIGHTS:
        raise Refused(f"cannot be {value}; use {', '.join((*_POLICY_WEIGHTS, *_POLICY_LOSSES))}")
    return {"loss.weight": _POLICY_WEIGHTS[value]}


def _level(value: object) -> Converted:
    """Of the importance ratios: those of sequences are GSPO."""
    if value in ("token", "sequence"):
        return {} if value == "token" else {"loss.use": "gspo"}
    raise Refused(f"cannot be {value}; use token or sequence (gspo)")


def _clip_range(value: object) -> Converted:
    """A range of rewards, which is one around zero here."""
    if value is None:
        return {}
    if isinstance(value, list) and len(value) == 2 and value[0] == -value[1]:
        return {"shaping.clip": value[1]}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"shaping.clip": value}
    raise Refused("must be a range around zero, as in [-10, 10] (shaping.clip: 10)")


def _completions(value: object) -> Converted:
    return {"log.rollouts": "parquet"} if read.switch(value) else {}


def _reward_model(value: object) -> Converted:
    return {} if value is None else {"reward.use": "model", "reward.path": value}


def _unless_null(target: str):
    """A setting that null leaves alone."""
    return lambda value: {} if value is None else {target: value}


def _divergence(value: object) -> Converted:
    return {"loss.f_divergence": _DIVERGENCES.get(str(value), value)}


def _sync(value: object) -> Converted:
    return {"reference.sync_steps": Unless(512) if read.switch(value) else None}


def _epsilon(value: object) -> Converted:
    return {"loss.clip_low": value, "loss.clip_high": Unless(value)}


def _scaled(value: object) -> Converted:
    if value in ("group", True):
        return {"credit.use": "grpo"}
    if value in ("none", False):
        return {"credit.use": "grpo_no_std"}
    raise Refused(f"cannot be {value}: rewards are scaled within a group (grpo) or not at all (grpo_no_std)")


def _assistant_only(value: object) -> Converted:
    return {"data.train_on": "completion"} if read.switch(value) else {}


def _completion_only(value: object) -> Converted:
    return {} if value is None else {"data.train_on": "completion" if read.switch(value) else "all"}


def _dtype(value: object) -> Converted:
    return {"model.dtype": value.removeprefix("torch.") if isinstance(value, str) else value}


TRL_NAMES = [
    by_method(
        "loss_type",
        {
            _REFERENCED: converted(
                _TRL,
                "",
                "loss.use",
                _pair_loss,
                "a list is a mixture with the coefficients of `loss_weights`, its `sft` is `nll_coef`",
            ),
            _ALONE: converted(
                _TRL,
                "",
                "loss.use",
                _reference_free,
                "`sigmoid` is `cpo`; TRL's `simpo` silently adds `cpo_alpha` 1 times the cross-entropy of the chosen, "
                "which here is method `cpo-simpo`, while method `simpo` adds none",
            ),
            _LABELLED: converted(_TRL, "", "loss.use", _labelled, ""),
            ("sft",): converted(_TRL, "", "loss.use", _supervised, "`nll` is the method's own"),
            REINFORCES: converted(
                _TRL,
                "",
                "loss.weight loss.use",
                _policy_loss,
                "`grpo` is weight `sequence`, `dapo` and `bnpo` are `token`, `dr_grpo` is `fixed_length`; `cispo` (its "
                "`epsilon_high` is `loss.clip_high` + 1) and `sapo` are losses",
            ),
        },
        "it has one loss; choose another with loss.use",
    ),
    renamed(_TRL, "loss_weights", "loss.coef", "one for each of `loss_type`"),
    by_method(
        "beta",
        {
            (*_REFERENCED, *_ALONE, "orpo", *_LABELLED): renamed(_BOTH, "", "loss.beta"),
            DISTILLS: renamed(
                _BOTH,
                "",
                "loss.beta",
                "0 is KL(teacher, student), 1 KL(student, teacher), 0.5 the Jensen-Shannon divergence, as in "
                "arXiv:2306.13649; the toolkit's text says that of 1, by mistake",
            ),
            REINFORCES: renamed(_TRL, "", "kl.coef", "the coefficient of the KL penalty"),
        },
        "its loss has no beta; leave it out",
    ),
    by_method(
        "label_smoothing",
        {
            ("sft", *_REFERENCED, *_ALONE): renamed(
                _TRL, "", "loss.label_smoothing", "refused with losses that have none, where TRL ignores it"
            )
        },
        "its loss has none; leave it out",
    ),
    renamed(_TRL, "rpo_alpha", "nll_coef"),
    renamed(_TRL, "cpo_alpha", "nll_coef"),
    renamed(_TRL, "simpo_gamma", "loss.gamma", "gamma itself, not its ratio to beta (`loss.gamma_ratio`)"),
    converted(_TRL, "ld_alpha", "loss.ld_alpha", _unless_null("loss.ld_alpha"), "null leaves it off"),
    converted(_TRL, "use_weighting", "loss.wpo", lambda value: {"loss.wpo": read.switch(value)}, "", switch=True),
    converted(
        _TRL,
        "f_divergence_type",
        "loss.f_divergence",
        _divergence,
        "`js_divergence` is `js`, `alpha_divergence` `alpha`",
    ),
    renamed(_TRL, "f_alpha_divergence_coef", "loss.f_alpha"),
    renamed(_TRL, "discopop_tau", "loss.tau"),
    renamed(_TRL, "precompute_ref_log_probs", "reference.precompute"),
    converted(
        _TRL,
        "sync_ref_model",
        "reference.sync_steps",
        _sync,
        "true is 512 unless `ref_model_sync_steps` is given",
        switch=True,
    ),
    renamed(_TRL, "ref_model_mixup_alpha", "reference.sync_alpha"),
    renamed(_TRL, "ref_model_sync_steps", "reference.sync_steps", "turns syncing on by itself"),
    renamed(_TRL, "desirable_weight", "loss.desirable_weight"),
    renamed(_TRL, "undesirable_weight", "loss.undesirable_weight"),
    converted(
        _TRL, "center_rewards_coefficient", "loss.centering", _unless_null("loss.centering"), "null leaves it off"
    ),
    # Distillation
    renamed(_BOTH, "teacher_model_name_or_path", "distill.teacher"),
    renamed(_BOTH, "lmbda", "distill.lmbda"),
    renamed(_BOTH, "seq_kd", "distill.seq_kd"),
    # Sampling
    renamed(_TRL, "max_new_tokens", "rollout.max_tokens"),
    by_method(
        "max_completion_length",
        {(*REINFORCES, *DISTILLS): renamed(_TRL, "", "rollout.max_tokens")},
        "data.max_length limits prompt and completion together; leave it out",
    ),
    by_method(
        "max_prompt_length",
        {REINFORCES: renamed(_TRL, "", "data.max_prompt_length", "longer prompts are dropped, not cut")},
        "data.max_length limits prompt and completion together; leave it out",
    ),
    renamed(_TRL, "temperature", "rollout.temperature", "of sampling; a loss on tempered logits is loss.temperature"),
    renamed(_TRL, "top_p", "rollout.top_p"),
    converted(_TRL, "top_k", "rollout.top_k", read.top_k, "-1 is 0"),
    renamed(_TRL, "num_generations", "rollout.group_size"),
    converted(
        _TRL, "epsilon", "loss.clip_low loss.clip_high", _epsilon, "the upper limit too, unless `epsilon_high` is given"
    ),
    converted(_TRL, "epsilon_high", "loss.clip_high", _unless_null("loss.clip_high"), "null is `epsilon`"),
    converted(_TRL, "delta", "loss.dual_clip", _unless_null("loss.dual_clip"), "null leaves it off"),
    converted(_TRL, "scale_rewards", "credit.use", _scaled, "`group` is `grpo`, `none` is `grpo_no_std`"),
    renamed(_TRL, "num_iterations", "rollout.num_ppo_epochs"),
    renamed(_BOTH, "num_ppo_epochs", "rollout.num_ppo_epochs"),
    renamed(_BOTH, "num_mini_batches", "rollout.optimizer_steps"),
    converted(_TRL, "importance_sampling_level", "loss.use", _level, "`sequence` is `gspo`, `token` the default"),
    renamed(_TRL, "sapo_temperature_pos", "loss.tau_positive"),
    renamed(_TRL, "sapo_temperature_neg", "loss.tau_negative"),
    renamed(_TRL, "mask_truncated_completions", "shaping.mask_truncated"),
    converted(_TRL, "reward_clip_range", "shaping.clip", _clip_range, "a range around zero"),
    converted(
        _TRL,
        "off_policy_mask_threshold",
        "correction.opsm",
        _unless_null("correction.opsm"),
        "null leaves it off",
    ),
    renamed(_TRL, "use_bias_correction_kl", "kl.unbiased"),
    idle(
        _TRL,
        "vllm_importance_sampling_correction",
        "correction says what becomes of a difference between engine and trainer",
    ),
    idle(_TRL, "top_entropy_quantile", "every token is trained", only=(1, 1.0)),
    refused(_TRL, "use_adaptive_entropy", "give entropy_coef, which stays as it is"),
    idle(_TRL, "multi_objective_aggregation", "rewards are added by their weights", only=("sum_then_normalize",)),
    renamed(_TRL, "num_generations_eval", "eval.num_samples"),
    renamed(_TRL, "chat_template_kwargs", "data.template_kwargs"),
    refused(_TRL, "generation_kwargs", _SAMPLING, off=(None, {})),
    refused(_TRL, "max_tool_calling_iterations", "give env.max_turns of an environment with tools", off=(None,)),
    *(
        idle(_TRL, name, "the embedded engine batches as it goes", only=None)
        for name in ("use_transformers_continuous_batching", "use_transformers_paged", "cache_implementation")
    ),
    # Of TRL's PPOConfig and earlier RLOOConfig
    converted(_BOTH, "cliprange", "loss.clip_low loss.clip_high", _epsilon, "both limits"),
    renamed(_BOTH, "cliprange_value", "critic.value_clip"),
    renamed(_BOTH, "vf_coef", "critic.coef", "with `critic.shared`; a critic of its own has its own optimizer"),
    of_credit(_BOTH, "lam", "lam"),
    converted(_BOTH, "kl_estimator", "kl.type", _unless_null("kl.type"), ""),
    renamed(_BOTH, "whiten_rewards", "shaping.whiten", "advantages are whitened, over the global batch"),
    renamed(_BOTH, "response_length", "rollout.max_tokens"),
    renamed(_BOTH, "rloo_k", "rollout.group_size"),
    converted(
        _BOTH, "reward_model_path", "reward.use reward.path", _reward_model, "the reward `model` with that folder"
    ),
    refused(_BOTH, "missing_eos_penalty", "use shaping.mask_truncated, or shaping.overlong_buffer", off=(None,)),
    idle(_BOTH, "stop_token", "completions end with the model's end tokens", only=("eos", None)),
    *(
        idle(_BOTH, name, "it changes how much is computed at a time, not what", only=None)
        for name in ("local_rollout_forward_batch_size", "ds3_gather_for_generation", "num_sample_generations")
    ),
    refused(_TRL, "generate_during_eval", _NOT_HERE),
    idle(_TRL, "min_p", _NOT_HERE, only=(None, 0, 0.0)),
    idle(_TRL, "repetition_penalty", _NOT_HERE, only=(None, 1, 1.0)),
    converted(
        _TRL,
        "log_completions",
        "log.rollouts",
        _completions,
        "true is `parquet`, under output_dir/rollouts",
        switch=True,
    ),
    # Data
    converted(
        _TRL,
        "assistant_only_loss",
        "data.train_on",
        _assistant_only,
        "true is `completion`; false leaves it to data.train_on, where TRL trains on every token of `messages`",
        switch=True,
    ),
    converted(
        _TRL,
        "completion_only_loss",
        "data.train_on",
        _completion_only,
        "true is `completion`, false is `all`, null leaves it",
        switch=True,
    ),
    renamed(_TRL, "dataset_text_field", "data.columns.text"),
    idle(_TRL, "truncation_mode", "sequences are cut at their end", only=("keep_start",)),
    idle(_TRL, "packing_strategy", "rows are never cut to fit", only=("bfd",)),
    idle(_TRL, "eval_packing", "rows never see each other, however they are laid out"),
    idle(_TRL, "padding_free", "batches are laid out without padding where the model allows it (model.attention)"),
    idle(_TRL, "pad_to_multiple_of", _SPEED, only=None),
    idle(_TRL, "dataset_num_proc", "rows are tokenised once and kept by content", only=None),
    idle(_TRL, "shuffle_dataset", "the order is drawn anew in every epoch anyway (data.shuffle)"),
    idle(_TRL, "pad_token", "there is no padding that a model could see", only=None),
    refused(_TRL, "eos_token", "sequences end as the chat template ends them (model.chat_template)", off=(None,)),
    renamed(_TRL, "chat_template_path", "model.chat_template"),
    # Model
    converted(
        _TRL,
        "use_peft",
        "model.adapter model.adapter.type",
        read.use_lora,
        "true is an adapter, false is `model.adapter: null`",
        switch=True,
    ),
    renamed(_TRL, "model_revision", "model.revision"),
    renamed(_TRL, "trust_remote_code", "model.trust_remote_code"),
    converted(_TRL, "dtype", "model.dtype", _dtype, "of the weights held for training"),
    converted(_TRL, "torch_dtype", "model.dtype", _dtype, "of the weights held for training"),
    renamed(_TRL, "use_bnb_nested_quant", "model.quantization.double", "makes quantised weights"),
    idle(_TRL, "bnb_4bit_quant_storage", "weights are stored as bitsandbytes stores them", only=None),
    idle(_TRL, "lora_task_type", "it follows from the method", only=None),
    refused(_TRL, "lora_modules_to_save", "an adapter trains its own weights and a score head only", off=(None, [])),
    idle(_TRL, "disable_dropout", "dropout is what the model's own config.json says, which is none in language models"),
    idle(_TRL, "router_aux_loss_coef", "there is no loss that balances experts in this version", only=(None, 0, 0.0)),
    refused(_TRL, "activation_offloading", "use backend.activation_checkpointing: true"),
    idle(_TRL, "use_liger_kernel", _SPEED),
    idle(
        _TRL, "precompute_ref_batch_size", "batches are cut by their tokens (backend.max_tokens_per_device)", only=None
    ),
]
