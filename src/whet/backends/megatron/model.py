"""This rank's part of a model: its layers, its share of their matrices, and the process groups around it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn
from transformers import PreTrainedConfig

from whet.backends.megatron.parts import Rotary, block
from whet.config.backend import BackendConfig
from whet.errors import ConfigError
from whet.ranks.layout import Layout
from whet.weights.megatron.blueprint import Blueprint


class Decoder(GPTModel):
    """This rank's layers. The first stage of the pipeline begins with the embedding; the last ends with the final norm,
    and returns hidden states, so that the head runs only where a loss looks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.value_head: nn.Linear | None = None

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    @property
    def head_weight(self) -> Tensor:
        """[V / ranks, H] this rank's words of the head, on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def set_up(config: BackendConfig, seed: int) -> Layout:
    """Megatron's process groups over all ranks, made once; a process alone is a world of its own.

    The numbering of ranks is that of `Layout`. Raises ConfigError for sizes that do not divide the ranks.
    """
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    size = dist.get_world_size()
    if size % config.model_parallel:
        raise ConfigError(
            f"{size} processes cannot hold copies of the model over {config.model_parallel} each "
            f"(backend.tensor_parallel {config.tensor_parallel} x context_parallel {config.context_parallel} x "
            f"pipeline_parallel {config.pipeline_parallel}); start a multiple of that"
        )
    layout = Layout.of(config, size)
    if (layout.data * layout.context) % layout.expert:
        raise ConfigError(
            f"backend.expert_parallel is {layout.expert}, which does not divide the {layout.data * layout.context} "
            "processes that see other tokens (data x context)"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            order="tp-cp-ep-dp-pp",
            distributed_timeout_minutes=max(1, math.ceil(config.timeout_s / 60)),
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return layout


def check_sizes(model: Blueprint, layout: Layout, sequence_parallel: bool) -> None:
    """Raises ConfigError, with all of them, for sizes that the model cannot be divided by."""
    settings, problems = model.settings, []
    heads, groups = settings["num_attention_heads"], settings["num_query_groups"]
    if heads % (layout.tensor * layout.context) or (not model.latent and groups % layout.tensor):
        problems.append(
            f"the model has {heads} attention heads in {groups} groups, which backend.tensor_parallel {layout.tensor} "
            f"and context_parallel {layout.context} do not divide"
        )
    widths = {"ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"} & settings.keys()
    if uneven := [f"{name} {settings[name]}" for name in sorted(widths) if settings[name] % layout.tensor]:
        problems.append(f"backend.tensor_parallel {layout.tensor} does not divide {', '.join(uneven)}")
    if model.num_layers % layout.pipeline:
        problems.append(f"backend.pipeline_parallel {layout.pipeline} does not divide the {model.num_layers} layers")
    if layout.expert > 1 and (not model.num_experts or model.num_experts % layout.expert):
        problems.append(f"backend.expert_parallel {layout.expert} does not divide the {model.num_experts} experts")
    if model.num_experts and layout.tensor > 1 and not sequence_parallel:
        problems.append("a model with experts under backend.tensor_parallel needs backend.sequence_parallel: true")
    if sequence_parallel and layout.tensor == 1:
        problems.append("backend.sequence_parallel needs backend.tensor_parallel of at least 2")
    if problems:
        raise ConfigError("; ".join(problems))


def build(
    config: PreTrainedConfig, model: Blueprint, settings: TransformerConfig, *, values: bool, device: torch.device
) -> Decoder:
    """This rank's part, with weights that are not set yet; with `values`, the last stage has a value head."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    first, count = get_transformer_layer_offset(settings), get_num_layers_to_build(settings)
    last = groups.pp.rank() == groups.pp.size() - 1
    decoder = Decoder(
        settings,
        block(model, range(first, first + count)),
        vocab_size=padded_vocabulary(model, groups.tp.size()),
        max_sequence_length=config.max_position_embeddings,
        pre_process=groups.pp.rank() == 0,
        post_process=last,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="rope",
        pg_collection=groups,
    )
    rotary = Rotary(config, model)
    if model.latent:
        for layer in decoder.decoder.layers:
            layer.self_attention.rotary_pos_emb = rotary
    else:
        decoder.rotary_pos_emb = rotary
    if values and last:
        decoder.value_head = nn.Linear(settings.hidden_size, 1, bias=False, dtype=torch.float32)
        decoder.value_head.weight.sequence_parallel = False
        nn.init.normal_(decoder.value_head.weight, std=getattr(config, "initializer_range", None) or 0.02)
    return decoder.to(device)


def padded_vocabulary(model: Blueprint, ranks: int) -> int:
    """Words of the embedding once each rank has as many as the others."""
    return -(-model.vocab_size // ranks) * ranks
