"""What a Hugging Face configuration is in Megatron-Core's terms, for the families that Megatron-Core can compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from whet.errors import ModelError

ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies are the same at every length."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "glm4", "deepseek_v3")


@dataclass(frozen=True)
class Blueprint:
    """How one model is built of Megatron's parts.

    `settings` are Megatron's own, under the names of its TransformerConfig (`MLATransformerConfig` with latent
    attention); they are plain values, and stand in its checkpoints as arguments.
    """

    family: str
    vocab_size: int
    tied: bool
    """Whether the head is the embedding."""
    settings: dict[str, Any]
    rotary_width: int
    """Numbers of each head that are rotated."""
    moe_layers: tuple[bool, ...]
    """For each layer, whether it has experts."""
    sandwich: bool = False
    """Whether attention and MLP are followed by a norm of their own, as in GLM-4."""
    fused_gate_up: bool = False
    """Whether the model's files hold gate and up projection as one tensor."""

    @property
    def num_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def num_experts(self) -> int:
        return self.settings.get("num_moe_experts", 0)

    @property
    def latent(self) -> bool:
        """Whether keys and values are made from a small common state (multi-head latent attention)."""
        return self.settings.get("multi_latent_attention", False)

    @property
    def stacked(self) -> bool:
        """Whether checkpoints hold each weight of all layers as one tensor: where all layers are alike."""
        return isinstance(self.settings.get("moe_layer_freq", 1), int)


def blueprint(config: PreTrainedConfig) -> Blueprint:
    """The blueprint of a model with this configuration.

    Raises ModelError for a family that is not known here, and for settings that Megatron-Core would compute otherwise
    than the model does.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise ModelError(
            f"the model is a {family!r}, which there is no map to Megatron-Core for (there is for "
            f"{', '.join(FAMILIES)}); use backend fsdp or deepspeed, or the format torch_dist"
        )
    _check(config)
    moe_layers = tuple(_has_experts(config, layer) for layer in range(config.num_hidden_layers))
    settings = _common(config) | _attention(config)
    if any(moe_layers):
        settings |= _EXPERTS[family](config)
        if not all(moe_layers):
            settings["moe_layer_freq"] = [int(has) for has in moe_layers]
    return Blueprint(
        family=family,
        vocab_size=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        settings=settings,
        rotary_width=_rotary_width(config),
        moe_layers=moe_layers,
        sandwich=family == "glm4",
        fused_gate_up=family == "glm4",
    )


def _common(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _attention(config: PreTrainedConfig) -> dict[str, Any]:
    if config.model_type == "deepseek_v3":
        return _latent(config)
    return {
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": _head_dim(config),
        "qk_layernorm": config.model_type in ("qwen3", "qwen3_moe"),
        "add_qkv_bias": config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False)),
        "rotary_interleaved": config.model_type == "glm4",
    }


def _latent(config: PreTrainedConfig) -> dict[str, Any]:
    rope = config.rope_parameters
    return {
        "multi_latent_attention": True,
        "num_query_groups": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "qk_layernorm": True,
        # Scores are multiplied by (0.1 mscale_all_dim log(factor) + 1)^2, Megatron's way and the model's.
        "rope_type": "yarn" if rope["rope_type"] == "yarn" else "rope",
        "rotary_scaling_factor": rope.get("factor", 1.0),
        "mscale_all_dim": rope.get("mscale_all_dim", 0.0),
    }


def _qwen_experts(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_router_topk": config.num_experts_per_tok,
        # A softmax over the chosen is the softmax over all, made to sum to one over the chosen.
        "moe_router_pre_softmax": not config.norm_topk_prob,
        **_PLAIN_ROUTER,
    }


def _deepseek_experts(config: PreTrainedConfig) -> dict[str, Any]:
    if not config.norm_topk_prob or config.num_experts_per_tok // config.topk_group != 2:
        raise ModelError(
            f"the router chooses {config.num_experts_per_tok} experts in {config.topk_group} groups"
            f"{'' if config.norm_topk_prob else ' without making their weights sum to one'}; Megatron-Core computes it "
            "alike only for twice as many experts as groups, whose weights sum to one; use backend fsdp"
        )
    return {
        "num_moe_experts": config.n_routed_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": config.moe_intermediate_size * config.n_shared_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_num_groups": config.n_group,
        "moe_router_group_topk": config.topk_group,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
        "moe_router_dtype": "fp32",
        **_PLAIN_ROUTER,
    }


_EXPERTS: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "qwen3_moe": _qwen_experts,
    "deepseek_v3": _deepseek_experts,
}
_PLAIN_ROUTER = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
"""As the model's own forward: no token dropped, no loss for the balance between experts."""


def _has_experts(config: PreTrainedConfig, layer: int) -> bool:
    if config.model_type == "qwen3_moe":
        sparse = (layer + 1) % config.decoder_sparse_step == 0
        return sparse and layer not in (config.mlp_only_layers or ()) and config.num_experts > 0
    return config.model_type == "deepseek_v3" and layer >= config.first_k_dense_replace


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary_width(config: PreTrainedConfig) -> int:
    if config.model_type == "deepseek_v3":
        return config.qk_rope_head_dim
    return int(_head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))


def _check(config: PreTrainedConfig) -> None:
    """Raises ModelError, with all of them, for settings that there is no place for in Megatron-Core."""
    family, rope = config.model_type, config.rope_parameters
    problems = []
    if rope.get("rope_type", "default") not in ROPES:
        problems.append(f"rope_type is {rope['rope_type']!r}, expected one of {', '.join(ROPES)}")
    elif rope["rope_type"] == "yarn" and family != "deepseek_v3":
        problems.append("rope_type is 'yarn', which there is a map for with DeepSeek's attention alone")
    if config.hidden_act != "silu":
        problems.append(f"hidden_act is {config.hidden_act!r}, expected 'silu'")
    if getattr(config, "mlp_bias", False) or (family != "glm4" and getattr(config, "attention_bias", False)):
        problems.append("its linear layers have biases")
    if getattr(config, "sliding_window", None) and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        problems.append(f"sliding_window is {config.sliding_window}")
    if family == "mistral" and config.sliding_window:
        problems.append(f"sliding_window is {config.sliding_window}")
    if family == "deepseek_v3" and not config.rope_interleave:
        problems.append("rope_interleave is false")
    if problems:
        raise ModelError(f"Megatron-Core cannot compute this {family} model: {'; '.join(problems)}; use backend fsdp")
