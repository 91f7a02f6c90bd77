"""Shapes of models that are often trained, as their config.json on the hub states them: no file is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


def _qwen3(hidden: int, layers: int, heads: int, intermediate: int, *, tied: bool = False) -> dict[str, Any]:
    sizes = _dense(hidden, layers, heads, 8, intermediate, 151_936, tied=tied)
    return {"model_type": "qwen3", **sizes, "head_dim": 128, "max_position_embeddings": 40_960}


def _qwen2(hidden: int, layers: int, heads: int, kv: int, intermediate: int, vocab: int = 152_064) -> dict[str, Any]:
    sizes = _dense(hidden, layers, heads, kv, intermediate, vocab, tied=vocab == 151_936)
    return {"model_type": "qwen2", **sizes, "max_position_embeddings": 32_768}


def _llama(hidden: int, layers: int, heads: int, kv: int, intermediate: int, vocab: int = 128_256) -> dict[str, Any]:
    tied = hidden in (2048, 3072) and vocab == 128_256
    sizes = _dense(hidden, layers, heads, kv, intermediate, vocab, tied=tied)
    return {"model_type": "llama", **sizes, "max_position_embeddings": 131_072 if vocab == 128_256 else 4096}


def _glm4(hidden: int, layers: int, heads: int, kv: int, intermediate: int) -> dict[str, Any]:
    sizes = _dense(hidden, layers, heads, kv, intermediate, 151_552)
    return {"model_type": "glm4", **sizes, "head_dim": 128, "max_position_embeddings": 32_768}


def _qwen3_moe(hidden: int, layers: int, heads: int, expert: int) -> dict[str, Any]:
    sizes = _dense(hidden, layers, heads, 4, 3 * hidden, 151_936)
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert, "norm_topk_prob": True}
    return {"model_type": "qwen3_moe", **sizes, **experts, "head_dim": 128, "max_position_embeddings": 40_960}


def _dense(
    hidden: int, layers: int, heads: int, kv: int, intermediate: int, vocab: int, *, tied: bool = False
) -> dict[str, Any]:
    return {
        **{"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads},
        **{"num_key_value_heads": kv, "intermediate_size": intermediate, "vocab_size": vocab},
        "tie_word_embeddings": tied,
    }


DEEPSEEK_V3 = {
    **{"model_type": "deepseek_v3", **_dense(7168, 61, 128, 128, 18_432, 129_280)},
    **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4},
    **{"moe_intermediate_size": 2048, "first_k_dense_replace": 3, "max_position_embeddings": 163_840},
}
"""Without the layer that predicts a second token, which whet does not train."""

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 9728, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 12_288),
    "Qwen/Qwen3-14B": _qwen3(5120, 40, 40, 17_408),
    "Qwen/Qwen3-32B": _qwen3(5120, 64, 64, 25_600),
    "Qwen/Qwen3-30B-A3B": _qwen3_moe(2048, 48, 32, 768),
    "Qwen/Qwen3-235B-A22B": _qwen3_moe(4096, 94, 64, 1536),
    "Qwen/Qwen2-7B": _qwen2(3584, 28, 28, 4, 18_944),
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 24, 14, 2, 4864, 151_936),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 28, 12, 2, 8960, 151_936),
    "Qwen/Qwen2.5-3B": _qwen2(2048, 36, 16, 2, 11_008, 151_936),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 28, 28, 4, 18_944),
    "Qwen/Qwen2.5-14B": _qwen2(5120, 48, 40, 8, 13_824),
    "Qwen/Qwen2.5-32B": _qwen2(5120, 64, 40, 8, 27_648),
    "Qwen/Qwen2.5-72B": _qwen2(8192, 80, 64, 8, 29_568),
    "meta-llama/Llama-3.2-1B": {**_llama(2048, 16, 32, 8, 8192), "head_dim": 64},
    "meta-llama/Llama-3.2-3B": {**_llama(3072, 28, 24, 8, 8192), "head_dim": 128},
    "meta-llama/Llama-3.1-8B": _llama(4096, 32, 32, 8, 14_336),
    "meta-llama/Llama-3.1-70B": _llama(8192, 80, 64, 8, 28_672),
    "deepseek-ai/deepseek-coder-6.7b-instruct": _llama(4096, 32, 32, 32, 11_008, 32_256),
    "openbmb/MiniCPM-2B-sft-bf16-llama-format": {
        **_llama(2304, 40, 36, 36, 5760, 122_753),
        "tie_word_embeddings": True,
    },
    "zai-org/GLM-4-9B-0414": _glm4(4096, 40, 32, 2, 13_696),
    "zai-org/GLM-4-32B-0414": {**_glm4(6144, 61, 48, 8, 23_040), "attention_bias": False},
    "deepseek-ai/DeepSeek-V3": DEEPSEEK_V3,
}
"""By the name on the hub, where each has the model card and the config.json that these numbers are from."""

SAME = {
    "GLM-Z1-9B-0414": "zai-org/GLM-4-9B-0414",
    "GLM-Z1-32B-0414": "zai-org/GLM-4-32B-0414",
    "DeepSeek-R1": "deepseek-ai/DeepSeek-V3",
    "DeepSeek-R1-0528": "deepseek-ai/DeepSeek-V3",
    "DeepSeek-V3-0324": "deepseek-ai/DeepSeek-V3",
}
"""Models of the same shape, by the last part of their names; those of Base, Instruct, Chat, Thinking are known too."""
ENDINGS = ("-Base", "-Instruct", "-Chat", "-Thinking", "-Instruct-2507", "-Thinking-2507")


def known_config(path: str) -> PreTrainedConfig | None:
    """The configuration of a model that is known by its name, or by the last part of a path to it."""
    name = Path(path).name
    for ending in sorted(ENDINGS, key=len, reverse=True):
        name = name.removesuffix(ending)
    full = SAME.get(name) or next((one for one in SHAPES if one.rpartition("/")[2].lower() == name.lower()), None)
    if full is None:
        return None
    shape = dict(SHAPES[full])
    return AutoConfig.for_model(shape.pop("model_type"), **shape)
