"""Sizes that families of models name differently, read from a configuration alone."""

from __future__ import annotations

from typing import Any


def experts(config: Any) -> tuple[int, int]:
    """How many experts a layer has to choose from, and how many of them a token goes through; (1, 1) without any."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((found for name in names if (found := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return (total, chosen) if total and chosen else (1, 1)


def head_dim(config: Any) -> int:
    """Dimensions of a key."""
    if _is_latent(config):
        return config.qk_nope_head_dim + config.qk_rope_head_dim
    return getattr(config, "head_dim", None) or config.hidden_size // max(getattr(config, "num_attention_heads", 1), 1)


def value_dim(config: Any) -> int:
    """Dimensions of a value, which are those of a key in most families."""
    return config.v_head_dim if _is_latent(config) else head_dim(config)


def kv_heads(config: Any) -> int:
    """Heads of keys and values, which several heads of queries may share."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def attending_layers(config: Any) -> int:
    """Layers that attend to all that is before, or to a window of it."""
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return config.num_hidden_layers
    return sum("linear" not in kind and "attention" in kind for kind in kinds)


def cached(config: Any, *, latent: bool = False) -> int:
    """Numbers that a layer keeps of a token to attend to it later.

    `latent`: as engines do that keep the vector from which keys and values are made, where the model has one
    (multi-head latent attention, arXiv:2405.04434), instead of keys and values themselves.
    """
    if latent and _is_latent(config):
        return config.kv_lora_rank + config.qk_rope_head_dim
    return kv_heads(config) * (head_dim(config) + value_dim(config))


def _is_latent(config: Any) -> bool:
    return bool(getattr(config, "kv_lora_rank", None))
