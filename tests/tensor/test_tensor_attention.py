"""Our attention in stock models: switched on and off, for whatever parts a model has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from whet.tensor.attention import NAME, attention


def tiny(attention: str, **more) -> Qwen3ForCausalLM:
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, **more}
    config = Qwen3Config(vocab_size=32, num_hidden_layers=1, intermediate_size=16, **shape)
    config._attn_implementation = attention
    return Qwen3ForCausalLM(config)


class Pair(PreTrainedModel):
    """A model with another inside that has a configuration, and attention, of its own."""

    config_class = Qwen3Config
    _supports_sdpa = True

    def __init__(self, outer: Qwen3ForCausalLM, inner: Qwen3ForCausalLM):
        super().__init__(outer.config)
        self.outer, self.inner = outer, inner

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_a_model_attends_as_before_once_the_context_ends_and_after_errors(own):
    model = tiny(own)
    for _ in range(2):  # the second time by what was found the first time
        with attention(model):
            assert model.model.layers[0].self_attn.config._attn_implementation == NAME
        assert model.config._attn_implementation == own
        with pytest.raises(ValueError, match="no luck"), attention(model):
            raise ValueError("no luck")
        assert model.config._attn_implementation == own


def test_models_inside_a_model_are_switched_with_it_and_each_goes_back_to_its_own():
    model = Pair(tiny("eager"), tiny("sdpa"))
    for _ in range(2):
        with attention(model):
            assert [part.config._attn_implementation for part in (model.outer, model.inner)] == [NAME, NAME]
        assert [part.config._attn_implementation for part in (model.outer, model.inner)] == ["eager", "sdpa"]


def test_a_change_of_the_attention_between_two_contexts_is_kept():
    model = tiny("eager")
    with attention(model):
        pass
    model.set_attn_implementation("sdpa")
    with attention(model):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_modules_are_looked_through_once(monkeypatch):
    model, looks = tiny("eager"), []
    monkeypatch.setattr(Qwen3ForCausalLM, "modules", lambda self: looks.append(self) or nn.Module.modules(self))
    for _ in range(3):
        with attention(model):
            pass
    assert len(looks) == 2  # once by us, once by transformers' own switch


def test_a_model_without_a_context_says_what_is_missing():
    model = tiny("eager")
    with attention(model), pytest.raises(AssertionError, match="was given no attention_context"):
        model(torch.ones(1, 3, dtype=torch.long))
