"""Adapters that begin as a part of the weights: against their definition, and against peft's own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config

from whet.config.model import AdapterConfig, ModelConfig
from whet.errors import ModelError
from whet.models.adapters import add_adapter
from whet.models.initial import Anchored
from whet.models.load import check_model_folder

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89]])
INITS = ["pissa", "olora"]


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


def adapted(layers):
    return {name: module for name, module in layers.named_modules() if hasattr(module, "lora_A")}


def train(model, steps=4, weight_decay=0.1):
    """A few steps that move the adapter well away from where it began."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=weight_decay)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_pissa_begins_as_the_best_approximation_of_its_rank(tiny_qwen):
    model = add_adapter(load(tiny_qwen), AdapterConfig(rank=4, alpha=8, init="pissa"))
    for layer in adapted(model).values():
        a, b = layer.lora_A["default"].trained, layer.lora_B["default"].trained
        u, s, vh = torch.linalg.svd(layer.base_layer.weight.double())
        best = u[:, :4] * s[:4] @ vh[:4]
        # alpha / rank = 2 scales the update.
        torch.testing.assert_close(2 * (b @ a).double(), best, rtol=0, atol=1e-5)
        # The singular values are shared out evenly: A's rows and B's columns have the length sqrt(s / 2).
        torch.testing.assert_close(a.norm(dim=1).double(), (s[:4] / 2).sqrt(), rtol=1e-5, atol=0)
        torch.testing.assert_close(b.norm(dim=0).double(), (s[:4] / 2).sqrt(), rtol=1e-5, atol=0)


def test_olora_begins_with_orthonormal_columns(tiny_qwen):
    model = add_adapter(load(tiny_qwen), AdapterConfig(rank=4, init="olora"))
    for layer in adapted(model).values():
        b = layer.lora_B["default"].trained
        torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-5)
        # W = Q R: the first columns of W are those of Q times R's upper left corner.
        a = layer.lora_A["default"].trained
        torch.testing.assert_close((b @ a)[:, :4], layer.base_layer.weight[:, :4], rtol=0, atol=1e-5)


def test_approximate_pissa_takes_nearly_as_much_out_of_the_weights(tiny_qwen):
    torch.manual_seed(0)
    model = add_adapter(load(tiny_qwen), AdapterConfig(rank=4, alpha=4, init="pissa_niter_16"))
    for layer in adapted(model).values():
        weight = layer.base_layer.weight
        rest = weight - layer.lora_B["default"].trained @ layer.lora_A["default"].trained
        least = torch.linalg.svdvals(weight)[4:].norm()
        assert least <= rest.norm() * (1 + 1e-5)
        assert rest.norm() < 1.01 * least < weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", INITS)
def test_the_model_begins_as_it_was_and_its_weights_stay(tiny_qwen, init, dtype):
    plain = load(tiny_qwen, dtype)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    expected = logits(plain)
    model = add_adapter(plain, AdapterConfig(rank=4, init=init))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    train(model)
    assert (logits(model) - expected).abs().max() > 0.1
    kept = model.get_base_model().state_dict()
    assert all(torch.equal(kept[name if name in kept else _wrapped(name)], before[name]) for name in before)


def _wrapped(name):
    return name.replace(".weight", ".base_layer.weight")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_training_goes_the_way_of_peft_which_takes_the_part_out_of_the_weights(tiny_llama, init, rslora):
    ours = add_adapter(load(tiny_llama), AdapterConfig(rank=4, alpha=8, init=init, rslora=rslora))
    options = {"r": 4, "lora_alpha": 8, "use_rslora": rslora, "init_lora_weights": init}
    theirs = get_peft_model(load(tiny_llama), LoraConfig("CAUSAL_LM", target_modules="all-linear", **options))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    for model in (ours, theirs):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, layer in adapted(theirs).items():
        mine = adapted(ours)[name]
        for side in ("lora_A", "lora_B"):
            expected = getattr(layer, side)["default"].weight.grad
            assert (getattr(mine, side)["default"].trained.grad - expected).norm() < 1e-4 * expected.norm()
    # By plain gradient descent: the sign of a gradient near zero, which AdamW follows, is rounding.
    for model in (ours, theirs):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= 0.5 * parameter.grad
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)


def test_weights_laid_out_the_other_way_are_taken_so():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=24, n_layer=1, n_head=2, eos_token_id=1)
    plain = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.tensor([[5, 9, 33]])
    expected = plain(tokens).logits
    weight = plain.transformer.h[0].attn.c_attn.weight.detach().clone()
    model = add_adapter(plain, AdapterConfig(rank=4, alpha=4, init="pissa", target_modules=["c_attn"])).eval()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    (layer,) = adapted(model).values()
    part = layer.lora_B["default"].trained @ layer.lora_A["default"].trained
    u, s, vh = torch.linalg.svd(weight.T)
    torch.testing.assert_close(part, u[:, :4] * s[:4] @ vh[:4], rtol=0, atol=1e-5)


def test_weight_decay_does_not_reach_the_half_that_stays(tiny_qwen):
    model = add_adapter(load(tiny_qwen), AdapterConfig(rank=4, init="pissa"))
    halves = {name: module for name, module in model.named_modules() if isinstance(module, Anchored)}
    before = {name: (module.fixed.clone(), module.trained.clone()) for name, module in halves.items()}
    train(model)
    for name, module in halves.items():
        assert torch.equal(module.fixed, before[name][0])
        assert not torch.equal(module.trained, before[name][1])
    assert all("lora_" in name and name.endswith("trained") for name, p in model.named_parameters() if p.requires_grad)


def test_a_rank_that_a_layer_does_not_have_is_refused_before_weights_are_read(tiny_qwen):
    adapter = AdapterConfig(rank=33, init="pissa")
    with pytest.raises(ModelError, match=r"rank is 33, but .*k_proj is 32 x 64 and has only 32 directions"):
        check_model_folder(ModelConfig(path=str(tiny_qwen), adapter=adapter))
    check_model_folder(ModelConfig(path=str(tiny_qwen), adapter=adapter.model_copy(update={"rank": 32})))


def test_an_embedding_is_no_linear_layer_to_begin_as(tiny_qwen):
    adapter = AdapterConfig(rank=4, init="pissa", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ModelError, match="embed_tokens is none; leave it out"):
        check_model_folder(ModelConfig(path=str(tiny_qwen), adapter=adapter))
    check_model_folder(ModelConfig(path=str(tiny_qwen), adapter=adapter.model_copy(update={"init": "gaussian"})))
