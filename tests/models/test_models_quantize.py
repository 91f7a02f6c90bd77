"""Weights in 4 and 8 bits: what is quantised, that it computes what it says, alike in training and evaluation."""

import asyncio
from importlib import util

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from whet.backends.device import Arithmetic
from whet.backends.parity import choose_mode
from whet.config.model import AdapterConfig, FreezeConfig, ModelConfig, QuantizationConfig
from whet.engines.local.engine import LocalEngine
from whet.errors import ModelError
from whet.models.adapters import adapter_off, trainable_summary
from whet.models.export import save_model
from whet.models.load import check_model_folder, load_model, load_tokenizer
from whet.models.restore import load_weights
from whet.types import Sampling

CPU = torch.device("cpu")
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89]])
KINDS = [
    {"bits": 4},
    {"bits": 4, "type": "fp4", "double": False},
    {"bits": 4, "compute_dtype": "bfloat16"},
    {"bits": 8},
]


def quantised(folder, *, adapter=None, seed=0, dtype="float32", **options):
    torch.manual_seed(seed)
    quantization = QuantizationConfig(**options)
    return load_model(ModelConfig(path=str(folder), quantization=quantization, adapter=adapter, dtype=dtype), CPU)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()


def loss_of(model):
    return model.train()(input_ids=TOKENS, labels=TOKENS).loss


@pytest.mark.parametrize("bits,kind", [(4, bitsandbytes.nn.Linear4bit), (8, bitsandbytes.nn.Linear8bitLt)])
def test_linear_layers_are_quantised_but_for_the_head(tiny_qwen, bits, kind):
    model = quantised(tiny_qwen, bits=bits)
    layers = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert layers.pop("lm_head") is nn.Linear
    assert len(layers) == 2 * 7 and set(layers.values()) == {kind}
    assert model.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 4, "type": "fp4", "double": False}])
def test_four_bits_compute_what_their_sixteen_values_say(tiny_llama, options):
    model = quantised(tiny_llama, **options)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    original = logits(plain)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            assert (state.quant_type, state.nested) == (options.get("type", "nf4"), options.get("double", True))
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            # Blocks of 64 share a scale, so that a block has at most 16 values.
            assert all(len(block.unique()) <= 16 for block in weight.flatten().view(-1, 64)[:8])
            plain.get_submodule(name).weight.data.copy_(weight)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-6)
    assert (logits(model) - original).abs().max() > 1e-2


@pytest.mark.parametrize("options", KINDS)
def test_evaluation_computes_what_training_does_and_leaves_it_alone(tiny_qwen, options):
    model = quantised(tiny_qwen, adapter=AdapterConfig(rank=4), **options)
    trained = model.train()(input_ids=TOKENS).logits.detach()
    assert torch.equal(logits(model), trained)
    loss_of(model).backward()
    gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    logits(model)
    loss_of(model).backward()
    assert len(gradient) == 2 * 2 * 7  # only the adapter learns
    assert all(torch.equal(p.grad, g) for p, g in zip(_trained(model), gradient, strict=True))
    assert all(g.norm() > 0 for g in gradient[1::2])  # B; A has none while B is zero


def _trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_counted_however_few_bits_they_have(tiny_qwen, bits):
    expected = trainable_summary(load_model(ModelConfig(path=str(tiny_qwen)), CPU))[1]
    assert trainable_summary(quantised(tiny_qwen, bits=bits)) == (0, expected)


@pytest.mark.parametrize(
    "options,adapter",
    [
        ({"bits": 4}, {}),
        ({"bits": 4}, {"init": "pissa"}),
        ({"bits": 4}, {"dora": True}),
        ({"bits": 8}, {}),
        ({"bits": 8}, {"init": "olora"}),
    ],
)
def test_an_adapter_begins_as_no_change_of_the_quantised_model_and_learns(tiny_qwen, options, adapter):
    plain = logits(quantised(tiny_qwen, **options))
    model = quantised(tiny_qwen, adapter=AdapterConfig(rank=4, **adapter), **options)
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-5)
    optimizer = torch.optim.AdamW(_trained(model), lr=1e-2)
    first = loss_of(model).item()
    for _ in range(8):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model).item() < first - 0.4
    with adapter_off(model):
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("adapter", [{}, {"init": "pissa"}, {"dora": True}])
def test_its_adapter_loads_in_plain_peft_on_the_quantised_and_on_the_plain_model(tiny_llama, tmp_path, adapter):
    model = quantised(tiny_llama, adapter=AdapterConfig(rank=4, **adapter), bits=4)
    generator = torch.Generator().manual_seed(7)
    for parameter in _trained(model):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_model(model, load_tokenizer(ModelConfig(path=str(tiny_llama))), tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    on_four = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=options, device_map={"": "cpu"})
    # In training mode: evaluation repacks the weights where the CPU knows bfloat16.
    again = PeftModel.from_pretrained(on_four, tmp_path).train()(input_ids=TOKENS).logits
    torch.testing.assert_close(again, logits(model), rtol=0, atol=1e-5)
    on_plain = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path))
    difference = (on_plain - logits(model)).abs().max()
    assert 1e-3 < difference < 0.3  # that of the 4 bits
    restored = quantised(tiny_llama, adapter=AdapterConfig(rank=4, **adapter), bits=4, seed=1)
    load_weights(restored, tmp_path)
    assert torch.equal(logits(restored), logits(model))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}])
def test_batches_go_through_the_tree(tiny_qwen, options, autocast, caplog):
    model = quantised(tiny_qwen, adapter=AdapterConfig(rank=4), **options)
    assert choose_mode(model, "auto", Arithmetic(CPU, autocast, "highest"), chunk_mb=64).mode == "tree"
    assert caplog.text == ""


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}])
async def test_the_embedded_engine_generates_with_quantised_weights(tiny_qwen, options):
    model = quantised(tiny_qwen, **options)
    assert not _trained(model)
    engine = LocalEngine(model, stop_token_ids=(258,))
    sampling = Sampling(max_tokens=8, temperature=0.0)
    prompts = [[1, 2, 3], [1, 2, 9, 4]]
    found = await asyncio.gather(*(engine.generate(prompt, sampling) for prompt in prompts))
    for prompt, completion in zip(prompts, found, strict=True):
        own = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=258)
        assert list(completion.tokens) == own[0, len(prompt) :].tolist()
    await engine.close()


def test_without_an_adapter_everything_is_frozen_whatever_freezing_asks_for(tiny_qwen):
    cfg = ModelConfig(path=str(tiny_qwen), quantization=QuantizationConfig(), freeze=FreezeConfig(layers=2))
    assert not _trained(load_model(cfg, CPU))


def test_an_adapter_that_was_saved_goes_on_top_of_quantised_weights(tiny_qwen, tmp_path):
    cfg = ModelConfig(path=str(tiny_qwen), adapter=AdapterConfig(rank=4))
    save_model(load_model(cfg, CPU), load_tokenizer(cfg), tmp_path)
    model = quantised(tmp_path, bits=4)
    assert _trained(model) and model.get_base_model().is_quantized


@pytest.mark.parametrize("call", [check_model_folder, lambda cfg: load_model(cfg, CPU)])
def test_a_missing_package_is_told_before_weights_are_read(tiny_qwen, monkeypatch, call):
    monkeypatch.setattr("whet.models.quantize.find_spec", lambda name: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    assert util.find_spec("bitsandbytes")
    with pytest.raises(ModelError, match=r"4 bits, but the package bitsandbytes is not installed; .*'\.\[qlora\]'"):
        call(ModelConfig(path=str(tiny_qwen), quantization=QuantizationConfig()))
