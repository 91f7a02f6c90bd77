"""slime's names, with Megatron's and SGLang's that stand in its launch scripts, and what becomes of each."""

from __future__ import annotations

from whet.config import conversions as read
from whet.config.conversions import Converted, checked, converted, idle, refused, renamed
from whet.config.slime_placement_names import SLIME_PLACEMENT_NAMES
from whet.config.slime_rollout_names import SLIME_ROLLOUT_NAMES

_SLIME = ("slime",)

_REFERENCE = (
    "the reference is the model at model.path as it was before training; for another give reference.path the folder "
    "of a transformers model"
)
_ARCHITECTURE = "the architecture is read from the model's own config.json"
_KERNELS = "attention, norms and sums are computed in float32 where it matters; there is nothing to choose"
_ELSEWHERE = "micro-batches, checkpoints and checks are done otherwise, with the same result"


def _grouped(value: object) -> Converted:
    return {"reward.group": True} if read.switch(value) else {}


def _per_token(value: object) -> Converted:
    return {"loss.weight": "token"} if read.switch(value) else {}


SLIME_NAMES = [
    *SLIME_ROLLOUT_NAMES,
    *SLIME_PLACEMENT_NAMES,
    renamed(_SLIME, "hf_checkpoint", "model.path"),
    renamed(_SLIME, "save", "output_dir"),
    renamed(_SLIME, "prompt_data", "data.train"),
    renamed(_SLIME, "input_key", "data.columns.prompt"),
    renamed(_SLIME, "label_key", "data.columns.label"),
    renamed(_SLIME, "rollout_shuffle", "data.shuffle"),
    renamed(_SLIME, "rollout_max_prompt_len", "data.max_prompt_length"),
    converted(_SLIME, "apply_chat_template", "data.chat", read.chat, "true is `always`, false is `never`", switch=True),
    renamed(_SLIME, "num_rollout", "train.steps"),
    renamed(_SLIME, "num_epoch", "train.epochs"),
    renamed(_SLIME, "lr", "optim.lr"),
    renamed(_SLIME, "adam_eps", "optim.eps"),
    renamed(_SLIME, "clip_grad", "optim.max_grad_norm"),
    renamed(_SLIME, "lr_decay_style", "optim.schedule"),
    renamed(_SLIME, "lr_warmup_iters", "optim.warmup_steps"),
    renamed(_SLIME, "lr_warmup_fraction", "optim.warmup_ratio"),
    refused(_SLIME, "min_lr", "give optim.min_lr_ratio, the share of the learning rate that it is", off=(None, 0, 0.0)),
    idle(_SLIME, "optimizer", "AdamW is the optimizer", only=("adam", "adamw")),
    renamed(_SLIME, "max_tokens_per_gpu", "backend.max_tokens_per_device"),
    idle(_SLIME, "use_dynamic_batch_size", "micro-batches are always cut by their tokens, without changing the loss"),
    renamed(_SLIME, "save_interval", "checkpoint.every_steps"),
    refused(
        _SLIME,
        "load",
        "a run goes on by itself from the newest checkpoint in output_dir; for another use checkpoint.resume",
        off=(None,),
    ),
    refused(_SLIME, "ref_load", _REFERENCE, off=(None,)),
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
    converted(
        _SLIME,
        "eps_clip",
        "loss.clip_low loss.clip_high",
        read.eps_clip,
        "the upper limit too, unless `eps_clip_high` is given",
    ),
    renamed(_SLIME, "eps_clip_high", "loss.clip_high"),
    renamed(_SLIME, "rm_type", "reward.use", "rows may choose another by `rm_type` in their metadata"),
    renamed(_SLIME, "custom_rm_path", "reward.use", "functions of `(args, sample)` run as they are"),
    converted(_SLIME, "group_rm", "reward.group", _grouped, "false leaves it to the function", switch=True),
    renamed(_SLIME, "reward_key", "reward.key"),
    renamed(_SLIME, "rm_url", "reward.rm_url"),
    converted(
        _SLIME,
        "calculate_per_token_loss",
        "loss.weight",
        _per_token,
        "true is `token`; false leaves the mean over completions of their token means",
        switch=True,
    ),
    idle(
        _SLIME, "rollout_max_context_len", "rollout.max_tokens limits completions, the model's positions all", only=None
    ),
    idle(_SLIME, "rollout_seed", "seed draws the prompts and the completions", only=None),
    idle(_SLIME, "rollout_skip_special_tokens", "special tokens are never shown to a reward"),
    idle(_SLIME, "attention_dropout", "dropout is what the model's own config.json says", only=(0, 0.0)),
    idle(_SLIME, "hidden_dropout", "dropout is what the model's own config.json says", only=(0, 0.0)),
    *(
        idle(_SLIME, name, _KERNELS, only=None)
        for name in (
            *(
                "accumulate_allreduce_grads_in_fp32",
                "attention_softmax_in_fp32",
                "attention_backend",
                "bias_swiglu_fusion",
            ),
            *("no_rope_fusion", "no_gradient_accumulation_fusion", "use_flash_attn", "transformer_impl"),
        )
    ),
    *(
        idle(_SLIME, name, _ELSEWHERE, only=None)
        for name in (
            *("no_check_for_nan_in_loss_and_grad", "micro_batch_size", "ref_micro_batch_size", "log_probs_chunk_size"),
            *(
                "log_probs_max_tokens_per_gpu",
                "ckpt_format",
                "no_load_optim",
                "no_load_rng",
            ),
        )
    ),
    *(
        idle(_SLIME, name, _ARCHITECTURE, only=None)
        for name in (
            *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention"),
            *("num_query_groups", "kv_channels", "qk_layernorm", "normalization", "norm_epsilon", "rotary_base"),
            *("rotary_percent", "use_rotary_position_embeddings", "position_embedding_type", "vocab_size", "spec"),
            *(
                "disable_bias_linear",
                "add_bias_linear",
                "add_qkv_bias",
                "swiglu",
                "untie_embeddings_and_output_weights",
            ),
            *(
                "post_self_attn_layernorm",
                "post_mlp_layernorm",
                "make_vocab_size_divisible_by",
                "max_position_embeddings",
            ),
            *(
                "multi_latent_attention",
                "q_lora_rank",
                "kv_lora_rank",
                "qk_head_dim",
                "qk_pos_emb_head_dim",
                "v_head_dim",
            ),
            *("seq_length", "rotary_scaling_factor", "mscale", "mscale_all_dim", "rotary_interleaved"),
        )
    ),
]

SLIME_FAMILIES = [
    idle(_SLIME, "moe_", _ARCHITECTURE, only=None),
    refused(_SLIME, "wandb_", "this version writes TensorBoard files and metrics.jsonl (always); leave it out", off=()),
    refused(_SLIME, "use_wandb", "this version writes TensorBoard files and metrics.jsonl (always); leave it out"),
]
"""Whole families of names, by how they begin."""
