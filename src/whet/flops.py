"""How much a model computes, and how much its device could: FLOPs of a pass over a batch, and peaks of devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from whet.hardware import gpu_named
from whet.models.parts import decoder
from whet.models.shape import attending_layers, experts, head_dim, value_dim
from whet.tree import Tree


def peak_flops(device_name: str, dtype: torch.dtype | None, matmul: str = "highest") -> float | None:
    """FLOP/s that a GPU of this name can reach at most; None where that is not known, and for CPUs.

    `dtype` is that of the products, None for float32, and `matmul` the precision of those.
    """
    gpu = gpu_named(device_name)
    if gpu is None:
        return None
    if dtype in (torch.bfloat16, torch.float16):
        return gpu.half
    return gpu.single if matmul == "highest" else gpu.tf32


class ModelFlops:
    """Counts what the matrix products of a model take: two operations per weight and token, experts by their share.

    Attention takes four per pair of a token and one it sees, per layer, head and dimension (arXiv:2204.02311,
    appendix B, which counts every pair where a causal model sees half). Windows are not taken into account.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        weights = list(_weights(decoder(model), config))
        self.per_token = 2.0 * sum(size for size, _ in weights)
        heads = getattr(config, "num_attention_heads", 0)
        self.per_pair = 2.0 * attending_layers(config) * heads * (head_dim(config) + value_dim(config))
        head = model.get_output_embeddings()
        self.per_looked = 0.0 if head is None else 2.0 * head.weight.numel()
        trained = 2.0 * sum(size for size, is_trained in weights if is_trained)
        if head is not None and head.weight.requires_grad:
            trained += self.per_looked
        self.trained_share = trained / max(self.per_token + self.per_looked, 1.0)

    def forward(self, tree: Tree, num_looked: int) -> float:
        """A forward pass over a tree, with the language-model head on `num_looked` tokens."""
        return self.per_token * tree.num_tokens + self.per_pair * pairs(tree) + self.per_looked * num_looked

    def forward_backward(self, tree: Tree, num_looked: int) -> float:
        """The same with its backward pass: gradients of all activations, and of those weights that are trained."""
        return (2.0 + self.trained_share) * self.forward(tree, num_looked)


def pairs(tree: Tree) -> int:
    """Pairs of a token and one that it sees, itself included."""
    lengths = np.diff(tree.starts)
    above = np.zeros(len(lengths), dtype=np.int64)
    for segment, parent in enumerate(tree.parents):
        if parent >= 0:
            above[segment] = above[parent] + lengths[parent]
    return int((lengths * above + lengths * (lengths + 1) // 2).sum())


def _weights(model: nn.Module, config: Any) -> Iterator[tuple[float, bool]]:
    """The size of every matrix that a token is multiplied with, and whether it is trained."""
    total, chosen = experts(config)
    share = chosen / total
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or hasattr(module, "base_layer"):
            continue  # looked up; or an adapter's wrapper, whose parts come by themselves
        is_expert = ".experts" in f".{name}"
        if isinstance(getattr(module, "in_features", None), int):  # also where weights are packed in few bits
            size = float(module.in_features * module.out_features)
            yield size * (share if is_expert else 1.0), module.weight.requires_grad
            continue
        for weight in module.parameters(recurse=False):
            if weight.ndim == 2 and not is_expert:
                yield float(weight.numel()), weight.requires_grad
            elif weight.ndim == 3 and is_expert:  # all experts in one tensor
                yield weight.numel() * share, weight.requires_grad
