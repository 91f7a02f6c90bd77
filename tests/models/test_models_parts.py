"""Decoder and head, against the model's own forward."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from whet.errors import ModelError
from whet.models.parts import base, decoder, head
from whet.models.tiny import make_tiny

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 1.0,
}
FAMILIES = {
    "Qwen3": {},
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 8.0},
    "MiniCPM3": {
        "dim_model_base": 8,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "HyperCLOVAX": {"logits_scaling": 4.0},
    "Phi": {},
    "Mistral": {},
    "Llama4Text": {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 16},
}
TOKENS = torch.tensor([[5, 9, 33, 61, 7, 2]])


def tiny(family, **more):
    options = {**SIZES, **FAMILIES.get(family, {}), **more}
    config_class = getattr(transformers, f"{family}Config", None)
    if config_class is None:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**options)).eval()


def own_and_ours(model):
    with torch.no_grad():
        own = model(input_ids=TOKENS, use_cache=False).logits
        ours = head(model).logits(decoder(model)(input_ids=TOKENS, use_cache=False).last_hidden_state)
    return own, ours


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_decoder_is_the_models_own_forward(family):
    own, ours = own_and_ours(tiny(family))
    assert own.std() > 0.1
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)


def test_scale_softcap_and_bias_are_found():
    assert head(tiny("Cohere")).scale == 0.25
    assert head(tiny("Granite")).scale == 0.125
    assert head(tiny("MiniCPM3")).scale == 0.25  # 8 / 32: dim_model_base over hidden_size
    assert head(tiny("HyperCLOVAX")).scale == 4.0
    assert head(tiny("Gemma2")).softcap == 2.0
    assert head(tiny("Gemma2", final_logit_softcapping=None)).softcap is None
    plain = head(tiny("Llama"))
    assert (plain.scale, plain.softcap, plain.bias) == (1.0, None, None)
    assert head(tiny("Phi")).bias is not None  # Phi's head has one


def test_bias_of_the_head_counts():
    model = tiny("Phi")
    nn.init.normal_(model.lm_head.bias)
    own, ours = own_and_ours(model)
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)
    model.lm_head.bias.data.zero_()
    assert not torch.allclose(own_and_ours(model)[1], own, atol=1e-2)


def test_logits_are_float32_and_keep_their_gradient():
    model = tiny("Qwen3", tie_word_embeddings=False).to(torch.bfloat16)
    hidden = torch.randn(3, 32, dtype=torch.float32, requires_grad=True)
    logits = head(model).logits(hidden)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_adapters_are_seen_through(tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path))
    wrapped = get_peft_model(plain, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    wrapped.eval()
    own, ours = own_and_ours(wrapped)
    assert torch.equal(ours, own)
    assert base(wrapped) is plain
    with wrapped.disable_adapter(), torch.no_grad():
        assert not torch.allclose(wrapped(input_ids=TOKENS).logits, own, atol=1e-3)


def test_head_with_an_adapter_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path, tie_embeddings=False))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ModelError, match="target_modules"):
        head(wrapped)


def test_models_without_head_are_refused(tmp_path):
    body = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path)).model
    with pytest.raises(ModelError, match="Qwen3Model has no language-model head"):
        head(body)
    with pytest.raises(ModelError, match="Qwen3Model has no decoder"):
        decoder(body)
