"""How much a model computes, and how much its device could: FLOPs of a pass over a batch, and known peaks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from whet.models.parts import decoder
from whet.models.shape import attending_layers, experts, head_dim, value_dim
from whet.tree import Tree

PEAKS = {
    r"B200|GB200": (2250e12, 1100e12, 80e12),
    r"H100 PCIe": (756e12, 378e12, 51e12),
    r"H100 NVL": (835e12, 418e12, 60e12),
    r"H100|H200|GH200": (989e12, 494e12, 67e12),
    r"H20\b": (148e12, 74e12, 44e12),
    r"A100|A800": (312e12, 156e12, 19.5e12),
    r"L40S": (362e12, 183e12, 91.6e12),
    r"L40\b": (181e12, 90.5e12, 90.5e12),
    r"\bL4\b": (121e12, 60e12, 30.3e12),
    r"A10G": (70e12, 35e12, 35e12),
    r"\bA10\b": (125e12, 62.5e12, 31.2e12),
    r"A6000": (155e12, 77.4e12, 38.7e12),
    r"RTX 5090": (209e12, 105e12, 105e12),
    r"RTX 4090": (165e12, 82.6e12, 82.6e12),
    r"RTX 3090": (71e12, 35.6e12, 35.6e12),
    r"V100": (125e12, 15.7e12, 15.7e12),
    r"\bT4\b": (65e12, 8.1e12, 8.1e12),
    r"MI300X": (1307e12, 653e12, 163e12),
    r"MI250": (383e12, 96e12, 96e12),
}
"""Device names -> dense FLOP/s in 16 bits, in TensorFloat-32 (or what takes its place), in float32, as their makers
state them; the first that fits counts."""


def peak_flops(device_name: str, dtype: torch.dtype | None, matmul: str = "highest") -> float | None:
    """FLOP/s that a GPU of this name can reach at most; None where that is not known, and for CPUs.

    `dtype` is that of the products, None for float32, and `matmul` the precision of those.
    """
    for pattern, (half, tf32, single) in PEAKS.items():
        if re.search(pattern, device_name):
            if dtype in (torch.bfloat16, torch.float16):
                return half
            return single if matmul == "highest" else tf32
    return None


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
