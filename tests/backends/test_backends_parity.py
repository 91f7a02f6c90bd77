"""The start-up check: families of models that run as trees, others that fall back, and lies that are found."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from whet.backends import parity
from whet.backends.device import Arithmetic
from whet.backends.forward import Forward
from whet.backends.parity import choose_mode, disagreement
from whet.batch import collate
from whet.errors import ModelError
from whet.losses import LOSSES
from whet.methods import Term
from whet.models.parts import Head
from whet.tensor import segments

CPU = torch.device("cpu")
EXACT = Arithmetic(CPU, None, "highest")
BF16 = Arithmetic(CPU, torch.bfloat16, "highest")

COMMON = {
    **{"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6},
    **{"first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 4},
}
# Windows are shorter than the rows of the check and of the units, so that they matter.
TREES = {
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "mistral": {"sliding_window": 16},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "qwen3_moe": EXPERTS,
    "deepseek_v3": LATENT,  # values narrower than keys
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},  # attention sinks
    "gpt2": {"n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
}
ROWS = {
    "mamba": ({"state_size": 4}, "layers of type linear_attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    "gpt_neo": ({"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, "2 of 2 layers do"),
    "phimoe": ({"num_local_experts": 4, "sliding_window": 16}, "does not tell its attention of its sliding window"),
}


def make(family: str, options: dict) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **options}))
    with torch.no_grad():  # larger weights than a fresh model's, so that what is wrong is far off
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3)
    return model.eval()


def within(units, vocabulary: int):
    """The units, their tokens folded into a vocabulary."""
    return [copy.deepcopy(u) for u in units if max(t for s in u.samples for t in s.tokens) < vocabulary]


@pytest.mark.parametrize("family", TREES)
def test_families_of_models_run_as_trees(family: str, units, backend_of):
    model = make(family, TREES[family])
    assert choose_mode(model, "auto", EXACT, chunk_mb=1).mode == "tree"
    units = within(units, COMMON["vocab_size"])
    gradients = []
    for layout in ("tree", "rows"):
        model.zero_grad(set_to_none=True)
        backend = backend_of(model, attention=layout)
        batch = collate(units, share_prefixes=backend.shares_prefixes).weighed(["token"])
        backend.forward_backward(batch, [Term("sft", LOSSES["sft"], "token")])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
    assert (gradients[0] - gradients[1]).norm() <= 2e-5 * gradients[1].norm()


@pytest.mark.parametrize("family", ROWS)
def test_models_that_mix_tokens_otherwise_fall_back_to_rows_and_say_why(family: str, caplog):
    options, reason = ROWS[family]
    model = make(family, options)
    with caplog.at_level(logging.WARNING, logger=parity.__name__):
        forward = choose_mode(model, "auto", EXACT, chunk_mb=1)
    assert forward.mode == "rows" and not forward.shares_prefixes
    assert "attention 'rows' is used: 'tree' cannot be" in caplog.text and reason in caplog.text


@pytest.mark.parametrize(("family", "option"), [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")])
def test_attention_dropout_that_is_left_out_is_said_to_be(family: str, option: str, caplog):
    with caplog.at_level(logging.WARNING, logger=parity.__name__):
        choose_mode(make(family, {option: 0.1, "n_layer": 2, "n_head": 4}), "auto", EXACT, chunk_mb=1)
    assert "attention dropout of 0.1, which way 'tree' leaves out; model.attention: rows keeps it" in caplog.text


def test_a_way_that_was_asked_for_is_not_exchanged_for_another():
    with pytest.raises(
        ModelError, match="MambaForCausalLM does not give the logprobs of its own forward: 'tree' cannot"
    ):
        choose_mode(make("mamba", ROWS["mamba"][0]), "tree", EXACT, chunk_mb=1)


def test_rows_by_a_mixing_that_no_name_gives_away_are_found_by_their_numbers():
    # Without its name in the configuration the convolution of lfm2 still shows in the logprobs.
    model = make("lfm2", {"layer_types": ["full_attention", "conv"]})
    mixing = parity._hidden_mixing
    try:
        parity._hidden_mixing = lambda *_: None
        assert "is off by" in disagreement(Forward(model, "tree"), EXACT)
    finally:
        parity._hidden_mixing = mixing


def no_ancestors(monkeypatch):
    plan = segments._plan_calls
    monkeypatch.setattr(segments, "_plan_calls", lambda tree: segments._Calls(plan(tree).own, []))


def not_causal(monkeypatch):
    flash = segments._flash
    monkeypatch.setattr(segments, "_flash", lambda *qkv, is_causal=False, scale=None: flash(*qkv, scale=scale))


def another_scale(monkeypatch):
    flash = segments._flash
    monkeypatch.setattr(segments, "_flash", lambda *qkv, scale=None, **k: flash(*qkv, scale=2 * scale, **k))


def rows_leak(monkeypatch):
    """As if packed rows were one long row."""
    plan = segments._plan_calls

    def leaking(tree):
        whole = slice(0, tree.num_tokens)
        return segments._Calls([segments._Call(whole, whole)], []) if (tree.parents < 0).all() else plan(tree)

    monkeypatch.setattr(segments, "_plan_calls", leaking)


ATTENTION_LIES = {
    "no ancestors": (no_ancestors, "packed"),  # trees are wrong, packed rows have no ancestors
    "not causal": (not_causal, "rows"),
    "another scale": (another_scale, "rows"),
    "rows leak": (rows_leak, "tree"),
}


@pytest.mark.parametrize("arithmetic", [EXACT, BF16], ids=["float32", "bf16"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("lie", ATTENTION_LIES)
def test_attention_that_lies_is_found_and_another_way_taken(lie, family, arithmetic, monkeypatch):
    tell, taken = ATTENTION_LIES[lie]
    model = make(family, {})
    tell(monkeypatch)
    if taken == "tree":
        assert "is off by" in disagreement(Forward(model, "packed"), arithmetic)
    else:
        assert choose_mode(model, "auto", arithmetic, chunk_mb=1).mode == taken


HEAD_LIES = {
    "a scale": lambda h: Head(h.module, h.weight, h.bias, 1.5, h.softcap),
    "a softcap": lambda h: Head(h.module, h.weight, h.bias, h.scale, 0.2),
    "a bias": lambda h: Head(h.module, h.weight, torch.linspace(-1, 1, len(h.weight)), h.scale, h.softcap),
    "other weights": lambda h: Head(h.module, h.weight.roll(1, 0), h.bias, h.scale, h.softcap),
}


@pytest.mark.parametrize("lie", HEAD_LIES)
def test_a_head_that_lies_is_refused_with_the_difference(lie: str, model, monkeypatch):
    from whet.backends import forward

    true_head = forward.head
    monkeypatch.setattr(forward, "head", lambda m: HEAD_LIES[lie](true_head(m)))
    with pytest.raises(
        ModelError, match=r"ForCausalLM does not give .*: 'tree' is off by [0-9.]+ \(mean .*'rows' is off"
    ):
        choose_mode(model, "auto", EXACT, chunk_mb=1)


def test_a_way_that_fails_is_named_with_its_error(model, monkeypatch):
    def fail(*_):
        raise IndexError("no such layer")

    monkeypatch.setattr(segments, "_plan_calls", fail)
    assert disagreement(Forward(model, "tree"), EXACT) == "fails: IndexError: no such layer"
    assert choose_mode(model, "auto", EXACT, chunk_mb=1).mode == "rows"


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_honest_models_pass_in_every_type(dtype: torch.dtype, temperature: float, model):
    model = model.to(dtype)
    for mode in parity.MODES:
        assert disagreement(Forward(model, mode, temperature=temperature), EXACT) is None
        if dtype == torch.float32:
            assert disagreement(Forward(model, mode, temperature=temperature), BF16) is None


def test_the_check_leaves_the_model_as_it_was(model):
    model.train()
    before, attention = torch.get_float32_matmul_precision(), model.config._attn_implementation
    for mode in parity.MODES:
        disagreement(Forward(model, mode), Arithmetic(CPU, torch.bfloat16, before))
    assert model.training and torch.get_float32_matmul_precision() == before
    assert model.config._attn_implementation == attention
    assert all(p.grad is None for p in model.parameters())
