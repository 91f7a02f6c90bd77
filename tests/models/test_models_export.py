"""What is saved loads elsewhere with the same logits."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from whet.config.model import AdapterConfig, ModelConfig
from whet.models.export import save_model
from whet.models.load import load_model, load_tokenizer
from whet.models.tiny import make_tiny
from whet.tensor.attention import NAME, attention

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89]])
CPU = torch.device("cpu")


def loaded(folder, **options):
    cfg = ModelConfig(path=str(folder), **options)
    return load_model(cfg, CPU), load_tokenizer(cfg)


def moved(model):
    """The model after its trained weights were changed, as training does."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_has_the_same_logits_in_plain_transformers(tmp_path, family, tied):
    source = make_tiny(tmp_path / "a", family=family, tie_embeddings=tied)
    model, tokenizer = loaded(source)
    original = logits(model)
    moved(model)
    save_model(model, tokenizer, tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), original)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_saved_tokenizer_and_stop_tokens_are_the_same(tmp_path):
    model, tokenizer = loaded(make_tiny(tmp_path / "a"))
    model.generation_config.pad_token_id = None
    save_model(model, tokenizer, tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    text = "12+3 = 15 <|im_end|> ñ"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([258, 256], 259)


def test_our_attention_does_not_reach_the_saved_configuration(tmp_path):
    model, tokenizer = loaded(make_tiny(tmp_path / "a"))
    with attention(model):
        save_model(model, tokenizer, tmp_path / "b")
    assert f'"{NAME}"' not in (tmp_path / "b" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(logits(again), logits(model))


def test_weights_are_written_in_the_dtype_asked_for_and_tied_ones_once(tmp_path):
    model, tokenizer = loaded(make_tiny(tmp_path / "a"))
    save_model(model, tokenizer, tmp_path / "b", dtype=torch.bfloat16)
    with safe_open(tmp_path / "b" / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    assert "lm_head.weight" not in names
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.dtype == torch.bfloat16
    rounded, _ = loaded(tmp_path / "a", dtype="bfloat16")
    assert torch.equal(logits(again), logits(rounded))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_adapter_has_the_same_logits_in_plain_peft(tmp_path, dtype):
    source = make_tiny(tmp_path / "a")
    model, tokenizer = loaded(source, adapter=AdapterConfig(rank=4, dropout=0.1), dtype=dtype)
    moved(model)
    save_model(model, tokenizer, tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    base = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    plain = logits(base)
    again = PeftModel.from_pretrained(base, tmp_path / "b").eval()
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), plain)


def test_saved_adapter_names_its_base_whole_and_training_goes_on(tmp_path, monkeypatch):
    make_tiny(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    model, tokenizer = loaded("a", adapter=AdapterConfig(rank=4))
    save_model(model, tokenizer, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "a")
    assert config["inference_mode"] is True
    assert model.peft_config["default"].inference_mode is False
    assert any(parameter.requires_grad for parameter in model.parameters())
