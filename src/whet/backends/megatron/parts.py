"""The layers of a model: Megatron-Core's, with our attention, norms and rotations.

So streams of tokens with shared prefixes run through them, on any device and divided in any way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from whet.backends.exchange import heads_for_stream, stream_for_heads
from whet.tensor.segments import Segments
from whet.weights.megatron.blueprint import Blueprint


@dataclass
class Stream(PackedSeqParams):
    """The tokens of one micro-batch, as Megatron hands them down to attention: one packed sequence, whose segments
    `segments` knows. `rotations` [P] are the positions that rotate queries and keys, in the order that Megatron wants.

    It travels with the call, so that layers which run again in the backward pass find that of their own micro-batch.
    """

    segments: Segments | None = None
    rotations: Tensor | None = None

    @classmethod
    def over(cls, segments: Segments, rotations: Tensor) -> Stream:
        """The stream of these segments."""
        length = len(rotations)
        bounds = torch.tensor([0, length], dtype=torch.int32, device=rotations.device)
        return cls(
            *("thd", bounds, bounds),
            max_seqlen_q=length,
            max_seqlen_kv=length,
            segments=segments,
            rotations=rotations,
        )


class Norm(nn.RMSNorm):
    """RMSNorm with the signature of Megatron's norms."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # With sequence parallelism each rank sees a part of the tokens: Megatron then sums the gradients.
        self.weight.sequence_parallel = config.sequence_parallel

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Where the weight stands in a checkpoint; every tensor-parallel rank has the whole of it."""
        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, {}, sharded_offsets)


class SegmentAttention(nn.Module):
    """Core attention over a stream's segments, in place of Megatron's, which knows no shared prefixes.

    With context parallelism ranks exchange heads for tokens around it (DeepSpeed-Ulysses, arXiv:2309.14509).
    """

    def __init__(
        self, config: Any, layer_number: int, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any
    ) -> None:
        super().__init__()
        self.scale, self.context = softmax_scale, pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, *, packed_seq_params: Stream, **_
    ) -> Tensor:
        """query [n, H, D], key and value [n, Hkv, D] of this rank's tokens -> [n, H * D]."""
        assert packed_seq_params.segments is not None, "attention over a stream of unknown segments"
        ranks = self.context.size()
        if key.shape[1] % ranks:  # each rank needs the keys that its queries look at
            repeat = ranks // math.gcd(key.shape[1], ranks)
            key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
        q, k, v = (heads_for_stream(x.transpose(0, 1)[None], self.context) for x in (query, key, value))
        out = packed_seq_params.segments.attend(self, q, k, v, self.scale)
        return stream_for_heads(out, self.context)[0].flatten(1)


class Rotary(nn.Module):
    """Rotary positions with the frequencies of the transformers model, at whatever positions the stream has.

    Megatron asks for a length first, then for the angles up to it: here the positions pass for the length.
    """

    def __init__(self, config: PreTrainedConfig, model: Blueprint) -> None:
        super().__init__()
        rope = config.rope_parameters
        if rope["rope_type"] == "default":
            exponents = torch.arange(0, model.rotary_width, 2, dtype=torch.int64).float() / model.rotary_width
            frequencies, self.scale = 1.0 / (rope["rope_theta"] ** exponents), 1.0
        else:
            frequencies, self.scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        # No buffer: the model's change to 16 bits must not reach it.
        self.frequencies = frequencies
        self.interleaved = model.settings.get("rotary_interleaved", False)
        self.returns_scale = model.settings.get("rope_type") == "yarn"

    def get_rotary_seq_len(self, *args: Any, **options: Any) -> Tensor:
        """What `forward` is called with: the stream is the last of Megatron's arguments."""
        return args[-1].rotations

    def forward(self, positions: Tensor, **_: Any) -> Tensor | tuple[Tensor, float]:
        """[P] -> angles [P, 1, 1, width]"""
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, None].float() * self.frequencies
        angles = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat([angles, angles], -1)
        angles = angles[:, None, None]
        return (angles, self.scale) if self.returns_scale else angles


class PostNormAttention(SelfAttention):
    """Attention with a norm after it."""

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.post_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, None]:
        out, _ = super().forward(*args, **options)
        return self.post_layernorm(out), None


class PostNormMLP(MLP):
    """An MLP with a norm after it."""

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.post_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, None]:
        out, _ = super().forward(*args, **options)
        return self.post_layernorm(out), None


def block(model: Blueprint, layers: range) -> TransformerBlockSubmodules:
    """What these layers of the model, and the norm that follows the last, are made of."""
    specs = {has_experts: _layer(model, has_experts) for has_experts in set(model.moe_layers)}
    return TransformerBlockSubmodules([specs[model.moe_layers[layer]] for layer in layers], Norm)


def _layer(model: Blueprint, has_experts: bool) -> ModuleSpec:
    provider = LocalSpecProvider()
    # Checkpoints have the names of a layer in which norms are a part of the linear layer behind them.
    stored = {} if model.latent else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not has_experts:
        stored["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    if model.latent:
        stored["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
        stored["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=_latent(provider) if model.latent else _attention(provider, model),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=_mlp(provider, model, has_experts),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=stored,
        ),
    )


def _attention(provider: LocalSpecProvider, model: Blueprint) -> ModuleSpec:
    qk_norm = Norm if model.settings["qk_layernorm"] else IdentityOp
    return ModuleSpec(
        module=PostNormAttention if model.sandwich else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=SegmentAttention,
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _latent(provider: LocalSpecProvider) -> ModuleSpec:
    columns = provider.column_parallel_linear()
    return ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=columns,
            linear_q_down_proj=columns,
            linear_q_up_proj=columns,
            linear_kv_down_proj=columns,
            linear_kv_up_proj=columns,
            core_attention=SegmentAttention,
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=Norm,
            kv_layernorm=Norm,
        ),
    )


def _mlp(provider: LocalSpecProvider, model: Blueprint, has_experts: bool) -> ModuleSpec:
    if has_experts:
        return get_moe_module_spec_for_backend(provider, num_experts=model.num_experts)
    return ModuleSpec(
        module=PostNormMLP if model.sandwich else MLP,
        submodules=MLPSubmodules(
            linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()
        ),
    )
