"""Counting what a model computes: worked by hand, against PyTorch's own counter, and known peaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from whet.flops import ModelFlops, pairs, peak_flops
from whet.models.tiny import make_tiny
from whet.tree import build, flat


def tree_of(*lengths: int):
    return flat([np.arange(length) for length in lengths])


def test_pairs_are_those_of_causal_attention_in_a_tree():
    assert pairs(tree_of(3)) == 1 + 2 + 3
    assert pairs(tree_of(3, 2)) == 6 + 3
    # Twenty shared tokens, then 1 and 2 of their own: 210, 21, 21 + 22.
    shared = np.arange(20)
    tree = build([np.append(shared, [100]), np.append(shared, [200, 201])])
    assert tree.num_tokens == 23
    assert pairs(tree) == 210 + 21 + 43
    # Twenty shared by three, of which two share twenty more: 210, 20 x 20 + 210, then a token behind 40, 40 and 20.
    rows = [np.append(shared, [100]), *(np.concatenate([shared, shared + 200, [last]]) for last in (300, 301))]
    assert pairs(build(rows)) == 210 + 610 + 41 + 41 + 21


@pytest.mark.parametrize("family", ["qwen3", "llama", "glm4", "qwen3_moe", "deepseek_v3"])
def test_the_count_is_that_of_pytorch(tmp_path: Path, family: str):
    model = AutoModelForCausalLM.from_pretrained(
        make_tiny(tmp_path, family=family), attn_implementation="eager", experts_implementation="eager"
    )
    counts, length = ModelFlops(model), 24
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None]).logits.sum().backward()
    # PyTorch multiplies every pair, not the half that a causal model sees; and nothing goes back into the embedding.
    unseen = counts.per_pair * (length**2 - length * (length + 1) / 2)
    ours = counts.forward_backward(tree_of(length), length) + 3 * unseen
    assert counts.trained_share == 1.0
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_an_adapter_spares_the_gradients_of_the_weights(tiny_qwen: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    plain = ModelFlops(model)
    adapted = ModelFlops(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])))
    assert 0 < adapted.trained_share < 0.1
    extra = adapted.per_token - plain.per_token
    layers = model.config.num_hidden_layers
    hidden, out = model.config.hidden_size, model.config.num_attention_heads * model.config.head_dim
    assert extra == 2 * layers * 2 * (hidden + out)


def test_of_many_experts_those_that_are_chosen_count():
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3MoeConfig(
        **sizes, head_dim=8, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, vocab_size=32
    )
    counts = ModelFlops(Qwen3MoeForCausalLM(config))
    attention, router, expert = 4 * 16 * 16, 16 * 8, 3 * 16 * 8
    assert counts.per_token == 2 * (attention + router + 2 * expert)
    assert counts.per_looked == 2 * 16 * 32
    assert counts.per_pair == 4 * 2 * 8


def test_peaks_of_known_devices():
    assert peak_flops("NVIDIA H200", torch.bfloat16) == peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", torch.float16) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", None) == 19.5e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", None, "high") == 156e12
    assert peak_flops("NVIDIA L4", torch.bfloat16) == 121e12
    assert peak_flops("NVIDIA L40S", torch.bfloat16) == 362e12
    assert peak_flops("Some device", torch.bfloat16) is None
