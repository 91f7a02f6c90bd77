"""Packed weights: the same numbers, never out of date, and no trace of them between two steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from whet.engines.local.engine import LocalEngine
from whet.engines.local.forward import Forward
from whet.engines.local.packed import SMALLEST, Packed
from whet.models.parts import Head
from whet.types import Sampling

PROMPT = list(b"What is two and two?")


@pytest.fixture(autouse=True)
def pack_small_layers(monkeypatch):
    """Tiny models have no layer that would gain."""
    monkeypatch.setattr("whet.engines.local.packed.SMALLEST", 1)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out = nn.Linear(48, 40, dtype=dtype), nn.Linear(40, 30, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def packed(model: Model, autocast: torch.dtype | None = None) -> Packed:
    return Packed(model, Head(model.out, model.out.weight, None), autocast)


@pytest.mark.parametrize("rows", [1, 7, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_and_head_compute_the_same(rows, dtype):
    model, x = Model(dtype), torch.randn(2, rows, 48).to(dtype)
    expected = model(x)
    with torch.inference_mode(), packed(model).installed():
        assert "forward" in model.inner.__dict__
        found = model(x)
    assert "forward" not in model.inner.__dict__
    assert found.dtype == dtype
    assert (found - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)
    weights = packed(model)
    with weights.installed():
        assert (weights.head(expected, model.out.weight, None) - model.out(expected)).abs().max() < 0.05


def test_autocast_computes_in_its_type_without_converting_the_weights_again():
    model, x = Model(), torch.randn(5, 48)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        weights = packed(model, torch.bfloat16)
        with weights.installed():
            found = model(x)
            head = weights.head(found, model.out.weight, None)
            assert torch.equal(head, F.linear(found, model.out.weight))
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("change", ["in place", "optimizer", "data", "inference"])
def test_a_weight_that_changes_is_packed_anew_and_the_others_are_not(change):
    model, x = Model(), torch.randn(5, 48)
    weights = packed(model)
    with torch.inference_mode(), weights.installed():
        before = model(x)
        head = weights._calls[model.out]
    if change == "in place":
        with torch.no_grad():
            model.inner.weight.mul_(2)
    elif change == "optimizer":
        model.inner(x).sum().backward()
        torch.optim.AdamW(model.parameters(), lr=0.1).step()
    elif change == "data":
        model.inner.weight.data = model.inner.weight.data * 2
    else:
        with torch.inference_mode():
            model.inner.weight.mul_(2)
    with torch.inference_mode(), weights.installed():
        found = model(x)
    assert (found - model(x)).abs().max() < 1e-5
    assert (found - before).abs().max() > 0.1
    assert weights._calls[model.out] is head


def test_what_would_not_gain_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("whet.engines.local.packed.SMALLEST", SMALLEST)
    assert not packed(Model())._weights
    monkeypatch.setattr("whet.engines.local.packed.SMALLEST", 1)
    assert not packed(Model(torch.float16))._weights
    with torch.inference_mode():
        hidden = Model()  # its weights do not tell when they change
    assert not packed(hidden)._weights
    own = Model()
    own.inner.forward = lambda x: x[..., :40]
    assert set(packed(own)._weights) == {own.out}


def test_an_error_on_the_way_leaves_no_trace():
    model = Model()
    with pytest.raises(ZeroDivisionError), packed(model).installed():
        _ = 1 / 0
    assert "forward" not in model.inner.__dict__


async def test_the_engine_packs_and_lets_go(tiny_qwen):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    engine = LocalEngine(model)
    assert engine._forward.packed._weights
    completion = await engine.generate(PROMPT, Sampling(max_tokens=8))
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + list(completion.tokens)]), use_cache=False).logits[0]
    own = logits.log_softmax(-1)[len(PROMPT) - 1 : -1].gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
    assert (torch.tensor(completion.logprobs) - own).abs().max() < 1e-5
    assert not any("forward" in module.__dict__ for module in model.modules())
    engine.release()
    assert not engine._forward.packed._calls
    assert not LocalEngine(model, packed_weights=False)._forward.packed._weights


def test_tied_weights_and_adapters_are_packed_as_they_are(tiny_qwen):
    from peft import LoraConfig, get_peft_model

    plain = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    model = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    forward = Forward(model, max_rows=1, packs=True)
    tokens = torch.tensor([PROMPT])
    expected = model(tokens, use_cache=False).logits[0, -1]
    forward.cache.reserve(1, len(PROMPT))
    with forward.running():
        found = forward.logits(forward.prefill([PROMPT], [[0]])[0])
    assert len(forward.packed._weights) == 2 * 7 * 3 + 1  # base, A and B of seven layers in two blocks, and the head
    assert (found - expected).abs().max() < 1e-5
