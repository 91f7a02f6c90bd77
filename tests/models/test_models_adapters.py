"""Adapters, freezing, and merging."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from whet.backends.forward import Forward, own_logprobs
from whet.backends.parity import _probe
from whet.config.model import AdapterConfig, FreezeConfig
from whet.errors import ModelError
from whet.models.adapters import (
    adapter_off,
    add_adapter,
    decoder_layers,
    freeze,
    has_adapter,
    load_adapter,
    reference_is_adapter_off,
    trainable_summary,
)
from whet.models.tiny import make_tiny

TOKENS = torch.tensor([[3, 14, 15, 92, 65]])


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(tmp_path_factory, request):
    return make_tiny(tmp_path_factory.mktemp("model"), family=request.param)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def adapted(folder, dtype=torch.float32, **options):
    """A model with an adapter that does something, the same at every call."""
    torch.manual_seed(0)
    model = add_adapter(load(folder, dtype), AdapterConfig(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_new_adapter_changes_nothing_and_trains_itself_alone(folder):
    plain = load(folder)
    before, count = logits(plain), sum(p.numel() for p in plain.parameters())
    model = add_adapter(plain, AdapterConfig(rank=2, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model), before)
    # q_proj is 64 -> 64 and down_proj 192 -> 64, in two layers: rank * (in + out) each.
    added = 2 * 2 * ((64 + 64) + (192 + 64))
    assert trainable_summary(model) == (added, count + added)
    assert has_adapter(model)
    assert not has_adapter(load(folder))


def test_alpha_over_rank_scales_the_update(folder):
    once, twice = adapted(folder, rank=4, alpha=4), adapted(folder, rank=4, alpha=8)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert once.get_submodule(layer).scaling["default"] == 1.0
    assert twice.get_submodule(layer).scaling["default"] == 2.0


def test_all_linear_adapts_every_linear_layer_but_the_head(folder):
    model = adapted(folder)
    modules = {name.rpartition(".lora_A")[0] for name in trained(model) if "lora_A" in name}
    assert len(modules) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in trained(model))


def test_target_modules_may_be_a_regular_expression(folder):
    assert all("layers.1.mlp" in name for name in trained(adapted(folder, target_modules=r".*layers\.1\.mlp\..*_proj")))


def test_adapter_is_float32_on_a_16_bit_model(folder):
    model = adapted(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "qproj"], "'qproj'.*q_proj"),
        ("q_proj", r"no module's whole name.*\(\[q_proj\]\)"),
        ("(", "no regular expression"),
        ([], "is empty"),
        (["lm_head"], "leave the head out"),
    ],
)
def test_target_modules_that_match_nothing_are_refused(folder, targets, said):
    with pytest.raises(ModelError, match=said):
        add_adapter(load(folder), AdapterConfig(target_modules=targets))


def test_adapter_off_is_the_base_model_and_leaves_no_trace(folder):
    base = logits(load(folder))
    model = adapted(folder)
    freeze(model, FreezeConfig(layers=1))
    with_adapter, flags = logits(model), trained(model)
    assert (with_adapter - base).abs().max() > 1e-2
    with adapter_off(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), with_adapter)
    assert trained(model) == flags
    with pytest.raises(ZeroDivisionError), adapter_off(model):
        _ = 1 / 0
    assert torch.equal(logits(model), with_adapter)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}, {"init": "olora"}])
def test_adapter_off_is_the_reference_under_a_new_adapter_of_any_kind(folder, options):
    base = logits(load(folder))
    model = adapted(folder, rank=4, **options)
    assert reference_is_adapter_off(model)
    with adapter_off(model):
        assert torch.equal(logits(model), base)


def test_adapter_off_is_not_the_reference_where_an_adapter_is_trained_on(folder, tmp_path):
    assert not reference_is_adapter_off(load(folder))
    adapted(folder, rank=4).save_pretrained(tmp_path)
    assert not reference_is_adapter_off(load_adapter(load(folder), tmp_path))


def test_a_gaussian_beginning_is_normal_and_the_default_is_uniform(folder):
    # Uniform within 1 / sqrt(64 inputs); normal with deviation 1 / rank.
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    uniform = adapted(folder, rank=16).get_submodule(layer).lora_A["default"].weight
    normal = adapted(folder, rank=16, init="gaussian").get_submodule(layer).lora_A["default"].weight
    assert uniform.abs().max() <= 1 / 8
    assert normal.abs().max() > 2 / 16 and 0.9 / 16 < normal.std() < 1.1 / 16


def test_rslora_scales_by_the_root_of_the_rank(folder):
    plain, stable = adapted(folder, rank=16, alpha=8), adapted(folder, rank=16, alpha=8, rslora=True)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert plain.get_submodule(layer).scaling["default"] == 0.5
    assert stable.get_submodule(layer).scaling["default"] == 2.0


def test_dora_keeps_the_length_of_each_row_apart_from_its_direction(folder):
    model = adapted(folder, rank=4, alpha=4, dora=True)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    weight = layer.base_layer.weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    # Arriving: the lengths of the rows as they were.
    torch.testing.assert_close(magnitude, weight.norm(dim=1), rtol=1e-6, atol=0)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    direction = (weight + update) / (weight + update).norm(dim=1, keepdim=True)
    magnitude.data.mul_(2.0)
    torch.testing.assert_close(layer(x), x @ (2 * weight.norm(dim=1)[:, None] * direction).T, rtol=1e-4, atol=1e-5)


KINDS = [{}, {"dora": True}, {"init": "pissa", "rslora": True}, {"init": "olora", "dora": True}]


@pytest.mark.parametrize("options", KINDS)
def test_every_kind_agrees_with_the_models_own_forward_through_the_tree(folder, options):
    model = adapted(folder, rank=4, **options)
    batch = _probe(260, share=True)
    ours = Forward(model, "tree")
    with ours.installed(), torch.no_grad():
        logprobs = ours(batch, {"logprobs"})["logprobs"]
    own = own_logprobs(model, batch)
    assert own.std() > 0.1
    torch.testing.assert_close(logprobs, own, rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", KINDS)
def test_every_kind_has_the_gradient_of_padded_rows_in_the_tree(folder, options):
    gradients = []
    for mode in ("tree", "rows"):
        model = adapted(folder, rank=4, **options)
        forward = Forward(model, mode)
        with forward.installed():
            forward(_probe(260, share=mode == "tree"), {"logprobs"})["logprobs"].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0, name
        assert (gradient - gradients[1][name]).norm() <= 1e-5 * gradient.norm(), name


def test_first_layers_are_frozen(folder):
    model = load(folder)
    freeze(model, FreezeConfig(layers=1))
    assert not any("layers.0." in name for name in trained(model))
    assert sum("layers.1." in name for name in trained(model)) == len(list(decoder_layers(model)[1].parameters()))
    assert "model.embed_tokens.weight" in trained(model)


def test_listed_layers_are_frozen(folder):
    model = load(folder)
    freeze(model, FreezeConfig(layers=[1]))
    assert not any("layers.1." in name for name in trained(model))
    assert any("layers.0." in name for name in trained(model))


def test_matching_parameters_are_frozen(folder):
    model = load(folder)
    freeze(model, FreezeConfig(patterns=[r"mlp\.", r"^model\.norm"]))
    assert not any("mlp" in name or name == "model.norm.weight" for name in trained(model))
    assert any("self_attn" in name for name in trained(model))


def test_embeddings_are_frozen_with_the_head_tied_to_them(folder, tmp_path):
    model = load(folder)
    freeze(model, FreezeConfig(embeddings=True))
    assert not model.lm_head.weight.requires_grad
    untied = load(make_tiny(tmp_path, tie_embeddings=False))
    freeze(untied, FreezeConfig(embeddings=True))
    assert not untied.get_input_embeddings().weight.requires_grad
    assert untied.lm_head.weight.requires_grad


def test_frozen_weights_stay_and_the_others_move(folder):
    model = load(folder)
    freeze(model, FreezeConfig(layers=1, embeddings=True))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": 3}, "layers is 3, but the model has 2 layers; give 0 to 2"),
        ({"layers": -1}, "layers is -1"),
        ({"layers": [0, 2]}, "has 2, but the model has layers 0 to 1"),
        ({"layers": [-1]}, "has -1"),
        ({"patterns": ["mlp.up_prj"]}, "matches no parameter.*mlp.up_proj.weight"),
        ({"patterns": ["["]}, "no regular expression"),
        ({"patterns": ["."]}, "nothing to train"),
    ],
)
def test_freezing_what_is_not_there_is_refused(folder, options, said):
    with pytest.raises(ModelError, match=re.compile(said, re.DOTALL)):
        freeze(load(folder), FreezeConfig(**options))
