"""Prefill and decode agree with the model's own forward, or the engine refuses the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from whet.engines.local.check import check
from whet.engines.local.forward import Forward
from whet.engines.local.pages import Paging
from whet.errors import EngineError

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def made(model_class: type, config: object) -> nn.Module:
    torch.manual_seed(0)
    model = model_class(config)
    for name, parameter in model.named_parameters():  # sharper than at initialisation, so that mistakes show
        if parameter.ndim == 2 and "router" not in name:
            nn.init.normal_(parameter, std=0.15)
    return model


def gemma2() -> nn.Module:
    return made(Gemma2ForCausalLM, Gemma2Config(**SHAPE, sliding_window=6, query_pre_attn_scalar=8))


def mistral() -> nn.Module:
    return made(MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=5))


def cohere() -> nn.Module:
    return made(CohereForCausalLM, CohereConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}))


def granite() -> nn.Module:
    scales = {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0}
    return made(GraniteForCausalLM, GraniteConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, **scales))


def gpt_oss() -> nn.Module:
    config = GptOssConfig(**SHAPE, sliding_window=4, num_local_experts=2, num_experts_per_tok=1)
    model = made(GptOssForCausalLM, config)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            nn.init.normal_(parameter, std=1.0)
    return model


def teacher_forced(forward: Forward, rows: list[np.ndarray], prompts: list[int]) -> list[torch.Tensor]:
    """Logprobs after each token from the prompt's last on, of each row; rows of any lengths, decoded together.

    Rows are ordered by descending number of decoded tokens, so that those that have ended drop off at the end.
    """
    forward.cache.reserve(len(rows), max(map(len, rows)))
    out: list[list[torch.Tensor]] = [[] for _ in rows]
    with forward.running():
        starts = [row[:n].tolist() for row, n in zip(rows, prompts, strict=True)]
        hidden, _ = forward.prefill(starts, [[i] for i in range(len(rows))])
        step = 0
        while True:
            for i, x in enumerate(forward.logits(hidden).log_softmax(-1)):
                out[i].append(x)
            alive = [i for i, row in enumerate(rows) if prompts[i] + step < len(row)]
            if not alive:
                return [torch.stack(x) for x in out]
            positions = np.array([prompts[i] + step for i in alive])
            tokens = np.array([rows[i][p] for i, p in zip(alive, positions, strict=True)])
            hidden = forward.decode(tokens, positions)
            step += 1


def worst_difference(model: nn.Module, lengths: list[tuple[int, int]], paging: Paging | None = None) -> float:
    """Largest difference of logprobs to the model's own forward; lengths are (prompt, decoded) by row."""
    model.eval()
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, 256, size=a + b) for a, b in lengths]
    ours = teacher_forced(Forward(model, max_rows=len(rows), paging=paging), rows, [a for a, _ in lengths])
    worst = 0.0
    for row, (prompt, _), logprobs in zip(rows, lengths, ours, strict=True):
        with torch.inference_mode():
            own = model(torch.from_numpy(row)[None], use_cache=False).logits[0, prompt - 1 :].log_softmax(-1)
        worst = max(worst, float((own - logprobs).abs().max()))
    return worst


CACHES = pytest.mark.parametrize("paging", [None, Paging(page=4)], ids=["slots", "pages"])
RAGGED = [(3, 20), (17, 12), (1, 9), (9, 9), (30, 1), (2, 0)]


@CACHES
@pytest.mark.parametrize("family", ["tiny_qwen", "tiny_llama"])
def test_logprobs_are_those_of_the_models_own_forward(family, paging, request):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(family))
    assert worst_difference(model, RAGGED, paging) < 1e-5


@CACHES
@pytest.mark.parametrize("make", [gemma2, mistral, cohere, granite, gpt_oss])
def test_windows_soft_caps_sinks_and_scales_are_the_models_own(make, paging):
    assert worst_difference(make(), RAGGED, paging) < 1e-4


@CACHES
@pytest.mark.parametrize("make", [gemma2, mistral, cohere, granite, gpt_oss])
def test_the_check_accepts_what_agrees(make, paging):
    check(make(), 300, paging=paging)


def test_logprobs_agree_when_a_step_attends_in_several_calls(tiny_qwen, monkeypatch):
    monkeypatch.setattr("whet.engines.local.contexts.CALL_ELEMENTS", 1500)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    assert worst_difference(model, RAGGED) < 1e-5


def test_a_model_without_attention_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(EngineError, match="2 of its 2 layers do not attend"):
        check(model, 300)


def test_a_window_that_the_attention_is_not_told_of_is_refused():
    model = gemma2()
    model.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(EngineError, match="layer 0 is of type 'sliding_attention'"):
        check(model, 300)


def test_a_model_that_computes_something_else_is_refused():
    model = mistral()
    project = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 1.1 * project(hidden)
    with pytest.raises(EngineError, match=r"does not reproduce MistralForCausalLM: its logprobs differ .* by"):
        check(model, 300)


def test_an_argument_that_would_be_left_out_is_refused(tiny_qwen):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs, position_bias=torch.zeros(1))
    with pytest.raises(EngineError, match="'position_bias'"):
        check(model, 260)


def test_the_model_is_left_as_it_was_found(tiny_qwen):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, attn_implementation="eager").train()
    model.model.layers[0].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    forward = Forward(model, max_rows=1, autocast=torch.bfloat16)
    with forward.running():
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "eager"
    assert not torch.is_inference_mode_enabled()


def test_autocast_computes_in_its_type_and_stays_close(tiny_qwen):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    rows = [np.arange(10, 30), np.arange(50, 60)]
    exact = teacher_forced(Forward(model, max_rows=2), rows, [5, 4])
    forward = Forward(model, max_rows=2, autocast=torch.bfloat16)
    rough = teacher_forced(forward, rows, [5, 4])
    assert all(keys.dtype == torch.bfloat16 for keys, _ in forward.cache._layers.values())
    assert 0 < max(float((a - b).abs().max()) for a, b in zip(exact, rough, strict=True)) < 0.1


def test_a_prefix_that_two_prompts_share_is_computed_once(tiny_qwen):
    forward = Forward(AutoModelForCausalLM.from_pretrained(tiny_qwen), max_rows=2)
    shared = list(range(40))
    forward.cache.reserve(2, 48)
    with forward.running():
        _, computed = forward.prefill([[*shared, 1, 2], [*shared, 3]], [[0], [1]])
    assert computed == 40 + 2 + 1
