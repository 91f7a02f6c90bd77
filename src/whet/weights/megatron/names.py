"""Weights in Megatron-Core's terms and in a Hugging Face folder's: which become which, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from whet.weights.megatron.blueprint import Blueprint

How = Literal["same", "qkv", "gate_up", "fused_gate_up"]
"""`qkv`: query, key and value projection, head group by head group. `gate_up`: the gate above the up projection;
`fused_gate_up` is the same where the files hold it so."""
GATED = ("gate_up", "fused_gate_up")


@dataclass(frozen=True)
class Weight:
    """One weight of a layer: `name` in a Megatron model that holds all layers and experts, the tensors of the Hugging
    Face folder that it is made of, and its place in a checkpoint: `index` in the leading dimensions, of size `of`, of
    the tensor `key`."""

    name: str
    sources: tuple[str, ...]
    how: How
    key: str
    index: tuple[int, ...] = ()
    of: tuple[int, ...] = ()
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class _Row:
    """A line of the tables: Megatron's name, the folder's, and the name in checkpoints where that is another."""

    name: str
    sources: tuple[str, ...]
    how: How = "same"
    stored: str | None = None


_ATTENTION = (
    _Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    _Row("input_layernorm.weight", ("input_layernorm.weight",), stored="self_attention.linear_qkv.layer_norm_weight"),
    _Row("self_attention.linear_qkv.weight", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), "qkv"),
)
_QKV_BIAS = (_Row("self_attention.linear_qkv.bias", tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), "qkv"),)
_QK_NORM = tuple(_Row(f"self_attention.{x}_layernorm.weight", (f"self_attn.{x}_norm.weight",)) for x in "qk")
_LATENT = (
    _Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    _Row("input_layernorm.weight", ("input_layernorm.weight",)),
    _Row("self_attention.linear_kv_down_proj.weight", ("self_attn.kv_a_proj_with_mqa.weight",)),
    _Row(
        "self_attention.kv_layernorm.weight",
        ("self_attn.kv_a_layernorm.weight",),
        stored="self_attention.linear_kv_up_proj.layer_norm_weight",
    ),
    _Row("self_attention.linear_kv_up_proj.weight", ("self_attn.kv_b_proj.weight",)),
)
_LOW_RANK_QUERY = (
    _Row("self_attention.linear_q_down_proj.weight", ("self_attn.q_a_proj.weight",)),
    _Row(
        "self_attention.q_layernorm.weight",
        ("self_attn.q_a_layernorm.weight",),
        stored="self_attention.linear_q_up_proj.layer_norm_weight",
    ),
    _Row("self_attention.linear_q_up_proj.weight", ("self_attn.q_b_proj.weight",)),
)
_QUERY = (_Row("self_attention.linear_q_proj.weight", ("self_attn.q_proj.weight",)),)
_SANDWICH = (
    _Row("self_attention.post_layernorm.weight", ("post_self_attn_layernorm.weight",)),
    _Row("mlp.post_layernorm.weight", ("post_mlp_layernorm.weight",)),
)
_DENSE = (
    _Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), stored="mlp.linear_fc1.layer_norm_weight"),
    _Row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",)),
)
_GATE_UP = (_Row("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"),)
_FUSED_GATE_UP = (_Row("mlp.linear_fc1.weight", ("mlp.gate_up_proj.weight",), "fused_gate_up"),)
_EXPERTS = (
    _Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
    _Row("mlp.router.weight", ("mlp.gate.weight",)),
)
_EXPERT_BIAS = (_Row("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",)),)
_SHARED = (
    _Row(
        "mlp.shared_experts.linear_fc1.weight",
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        "gate_up",
    ),
    _Row("mlp.shared_experts.linear_fc2.weight", ("mlp.shared_experts.down_proj.weight",)),
)
_EXPERT = (
    _Row("linear_fc1.weight", ("gate_proj.weight", "up_proj.weight"), "gate_up"),
    _Row("linear_fc2.weight", ("down_proj.weight",)),
)


def weights_of(model: Blueprint, *, stacked: bool | None = None) -> Iterator[Weight]:
    """Every weight of a model, from the embedding to the head.

    `stacked`: whether its checkpoint holds the weights of all layers as one tensor; as Megatron does if not given.
    """
    stacked = model.stacked if stacked is None else stacked
    yield _outside("embedding.word_embeddings.weight", "model.embed_tokens.weight")
    for layer, has_experts in enumerate(model.moe_layers):
        for row in _rows(model, has_experts):
            yield _in_layer(model, layer, row, stacked)
        for expert in range(model.num_experts if has_experts else 0):
            for row in _EXPERT:
                yield _in_expert(model, layer, expert, row, stacked)
    yield _outside("decoder.final_layernorm.weight", "model.norm.weight")
    if not model.tied:
        yield _outside("output_layer.weight", "lm_head.weight")


def _rows(model: Blueprint, has_experts: bool) -> Iterator[_Row]:
    """The rows of one layer, but for its experts."""
    settings = model.settings
    if model.latent:
        yield from _LATENT
        yield from _LOW_RANK_QUERY if settings["q_lora_rank"] is not None else _QUERY
    else:
        yield from _ATTENTION
        yield from _QKV_BIAS if settings["add_qkv_bias"] else ()
        yield from _QK_NORM if settings["qk_layernorm"] else ()
    yield from _SANDWICH if model.sandwich else ()
    if has_experts:
        yield from _EXPERTS
        yield from _EXPERT_BIAS if settings.get("moe_router_enable_expert_bias") else ()
        yield from _SHARED if "moe_shared_expert_intermediate_size" in settings else ()
    else:
        yield from _DENSE
        yield from _FUSED_GATE_UP if model.fused_gate_up else _GATE_UP


def _outside(name: str, source: str) -> Weight:
    return Weight(name, (source,), "same", name)


def _in_layer(model: Blueprint, layer: int, row: _Row, stacked: bool) -> Weight:
    sources = tuple(f"model.layers.{layer}.{source}" for source in row.sources)
    key, index, of = _place(model, layer, row.stored or row.name, stacked)
    return Weight(f"decoder.layers.{layer}.{row.name}", sources, row.how, key, index, of, layer)


def _in_expert(model: Blueprint, layer: int, expert: int, row: _Row, stacked: bool) -> Weight:
    sources = tuple(f"model.layers.{layer}.mlp.experts.{expert}.{source}" for source in row.sources)
    key, index, of = _place(model, layer, f"mlp.experts.experts.{row.name}", stacked)
    name = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.{row.name}"
    return Weight(name, sources, row.how, key, (*index, expert), (*of, model.num_experts), layer=layer, expert=expert)


def _place(model: Blueprint, layer: int, name: str, stacked: bool) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    if stacked:
        return f"decoder.layers.{name}", (layer,), (model.num_layers,)
    return f"decoder.layers.{layer}.{name}", (), ()


def join(how: How, parts: Sequence[Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Tensors of a Hugging Face folder as one of Megatron's."""
    if how == "gate_up":
        return torch.cat(list(parts))
    if how == "qkv":
        groups = settings["num_query_groups"]
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
    return parts[0]


def separate(how: How, tensor: Tensor, settings: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The way back of `join`."""
    if how == "gate_up":
        return tensor.chunk(2)
    if how == "qkv":
        groups, width = settings["num_query_groups"], settings["kv_channels"]
        queries = settings["num_attention_heads"] // groups * width
        parts = tensor.unflatten(0, (groups, -1)).split([queries, width, width], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)
    return (tensor,)


def part(how: How, tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """What tensor-parallel rank `rank` of `size` holds of one of Megatron's tensors, divided along `dim`.

    Gate and up projection are divided apart: a rank's part is the same rows of both.
    """
    if how in GATED and dim == 0:
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size, dim)[rank]


def whole(how: How, parts: Sequence[Tensor], dim: int) -> Tensor:
    """The way back of `part`, from the parts of all ranks."""
    if how in GATED and dim == 0:
        gates, ups = zip(*(one.chunk(2) for one in parts), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(list(parts), dim)
