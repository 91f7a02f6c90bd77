"""What is saved loads elsewhere with the same logits."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from whet.checkpoints.state import load_optimizer, save_optimizer
from whet.config.model import AdapterConfig, ModelConfig
from whet.errors import CheckpointError
from whet.models.export import save_model
from whet.models.load import load_model, load_tokenizer
from whet.models.restore import load_weights
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


KINDS = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa", "dropout": 0.1},
    "pissa_niter": {"init": "pissa_niter_2", "rslora": True},
    "olora": {"init": "olora"},
    "pissa with dora": {"init": "pissa", "dora": True},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_kind_of_adapter_has_the_same_logits_in_plain_peft_on_the_original_model(tmp_path, tiny_llama, options):
    model, tokenizer = loaded(tiny_llama, adapter=AdapterConfig(rank=4, **options))
    moved(model)
    save_model(model, tokenizer, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    plain = logits(base)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert (logits(again) - plain).abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, *KINDS.values()], ids=["lora", *KINDS])
def test_training_goes_on_from_what_was_saved_to_the_bit(tmp_path, tiny_qwen, options):
    def step(model, optimizer):
        model.train()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def begin(seed):
        torch.manual_seed(seed)
        model, _ = loaded(tiny_qwen, adapter=AdapterConfig(rank=4, **(options | {"dropout": 0.0})))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, fused=True)

    model, optimizer = begin(seed=0)
    step(model, optimizer)
    save_model(model, load_tokenizer(ModelConfig(path=str(tiny_qwen))), tmp_path)
    save_optimizer(optimizer, tmp_path)
    step(model, optimizer)
    again, afresh = begin(seed=1)
    load_weights(again, tmp_path)
    load_optimizer(afresh, tmp_path)
    step(again, afresh)
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_adapter_of_another_rank_does_not_fit(tmp_path, tiny_qwen):
    for init in ("default", "pissa"):
        model, tokenizer = loaded(tiny_qwen, adapter=AdapterConfig(rank=4, init=init))
        save_model(model, tokenizer, tmp_path / init)
        other, _ = loaded(tiny_qwen, adapter=AdapterConfig(rank=2, init=init))
        with pytest.raises(CheckpointError, match="does not fit the model"):
            load_weights(other, tmp_path / init)


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
