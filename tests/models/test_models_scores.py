"""Score heads: put on any language model, saved and read again whole, the same in plain transformers and peft."""

import json
import logging

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from whet.config.model import AdapterConfig, ModelConfig, QuantizationConfig
from whet.errors import ModelError
from whet.models.export import save_model
from whet.models.load import check_model_folder, load_model, load_tokenizer
from whet.models.parts import decoder, score_head
from whet.models.quantize import compute_alike
from whet.models.restore import load_weights
from whet.models.tiny import make_tiny

CPU = torch.device("cpu")
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 258]])


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(tmp_path_factory, request):
    # One with the head tied to the embeddings, one with a head of its own.
    tied = request.param == "qwen3"
    return make_tiny(tmp_path_factory.mktemp("model"), family=request.param, tie_embeddings=tied)


def config_of(folder, **options):
    return ModelConfig(path=str(folder), **options)


def reward_model(cfg, seed=0):
    torch.manual_seed(seed)
    return load_model(cfg, CPU, scores=True)


def moved(model):
    """The model after its trained weights were changed, as training does."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


@torch.no_grad()
def score(model):
    """Of the whole of TOKENS, by our parts."""
    return score_head(model.eval())(decoder(model)(input_ids=TOKENS, use_cache=False).last_hidden_state[0, -1].float())


@torch.no_grad()
def plain_score(model):
    """The same by a plain classifier's own forward, in a batch padded on the right."""
    padding = torch.full((1, 3), model.config.pad_token_id)
    rows = torch.cat([torch.cat([TOKENS, padding], 1), TOKENS.repeat(1, 2)[:, :10]])
    mask = torch.ones_like(rows)
    mask[0, -3:] = 0
    return model.eval()(input_ids=rows, attention_mask=mask).logits[0].float()


def saved(cfg, folder):
    """A reward model that was trained, in a folder."""
    model = moved(reward_model(cfg))
    save_model(model, load_tokenizer(cfg), folder)
    return model


def test_a_new_head_is_float32_and_small_and_comes_from_the_seed(folder):
    model = reward_model(config_of(folder, dtype="bfloat16"))
    weight = score_head(model).weight
    assert weight.shape == (1, 64) and weight.dtype == torch.float32 and weight.requires_grad
    assert 0.01 < weight.std() < 0.04  # the family's initializer_range, 0.02
    assert torch.equal(score_head(reward_model(config_of(folder))).weight, weight)
    assert not torch.equal(score_head(reward_model(config_of(folder), seed=1)).weight, weight)


def test_the_head_for_words_is_frozen_unless_it_is_the_embedding(folder):
    model = reward_model(config_of(folder))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == (set() if model.config.tie_word_embeddings else {"lm_head.weight"})


def test_a_language_model_has_no_score_head(folder):
    with pytest.raises(ModelError, match="has no score head"):
        score_head(load_model(config_of(folder), CPU))


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_saved_whole_it_gives_the_same_score_in_plain_transformers(folder, tmp_path, dtype, tolerance):
    model = saved(config_of(folder, dtype=dtype), tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    assert plain.config.num_labels == 1 and plain.config.architectures == [type(plain).__name__]
    torch.testing.assert_close(plain_score(plain), score(model), rtol=0, atol=tolerance)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


ADAPTERS = [{}, {"dora": True}, {"init": "pissa"}]


@pytest.mark.parametrize("options", ADAPTERS)
def test_saved_as_an_adapter_it_gives_the_same_score_in_plain_peft(folder, tmp_path, options):
    cfg = config_of(folder, adapter=AdapterConfig(rank=4, **options))
    model = saved(cfg, tmp_path)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if "lora_" not in name] == [
        "base_model.model.score.modules_to_save.default.weight"
    ]
    assert not any("score" in name and "lora" in name for name in trained)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, pad_token_id=259)
    torch.testing.assert_close(plain_score(plain), score(model), rtol=0, atol=1e-6)
    assert score(model).abs() > 0.05


def test_trained_on_quantised_weights_it_gives_the_same_score_in_plain_peft(folder, tmp_path):
    cfg = config_of(folder, adapter=AdapterConfig(rank=4), quantization=QuantizationConfig())
    model = saved(cfg, tmp_path)
    assert type(score_head(model).original_module) is torch.nn.Linear
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=1, pad_token_id=259, quantization_config=four, device_map={"": "cpu"}
    )
    compute_alike(plain)
    torch.testing.assert_close(plain_score(plain), score(model), rtol=0, atol=1e-6)


KINDS = {
    "full": {},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"adapter": AdapterConfig(rank=4)},
    "qlora": {"adapter": AdapterConfig(rank=4, init="pissa"), "quantization": QuantizationConfig()},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_it_is_read_again_to_the_bit_as_a_checkpoint_and_as_a_model(folder, tmp_path, options):
    cfg = config_of(folder, **options)
    model = saved(cfg, tmp_path)
    restored = reward_model(cfg, seed=1)
    load_weights(restored, tmp_path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(restored.get_parameter(name), p) for name, p in trained.items())
    assert torch.equal(score(restored), score(model))
    again = reward_model(cfg.model_copy(update={"path": str(tmp_path), "adapter": None}), seed=2)
    assert torch.equal(score(again), score(model))
    assert {name for name, p in again.named_parameters() if p.requires_grad} >= {n for n in trained if "score" in n}


def test_scores_are_trained_through_the_head_and_the_body(folder):
    for options in KINDS.values():
        model = reward_model(config_of(folder, **options)).train()
        hidden = decoder(model)(input_ids=TOKENS, use_cache=False).last_hidden_state[0, -1]
        score_head(model)(hidden.float()).sum().backward()
        learnt = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0]
        assert any("score" in name for name in learnt) and any("layers.0" in name for name in learnt)


@pytest.mark.parametrize("options", [{}, {"adapter": AdapterConfig(rank=4)}])
def test_a_reward_model_is_no_language_model(folder, tmp_path, options):
    saved(config_of(folder, **options), tmp_path)
    for call in (check_model_folder, lambda cfg: load_model(cfg, CPU)):
        with pytest.raises(ModelError, match=r"reward model.* gives scores and no words; give the language model"):
            call(config_of(tmp_path))
    check_model_folder(config_of(tmp_path), scores=True)


def test_an_adapter_on_top_of_a_reward_model_is_none_either(folder, tmp_path):
    saved(config_of(folder), tmp_path / "whole")
    with pytest.raises(ModelError, match="reward model"):
        check_model_folder(config_of(tmp_path / "whole", adapter=AdapterConfig(rank=4)))
    model = saved(config_of(tmp_path / "whole", adapter=AdapterConfig(rank=4)), tmp_path / "adapter")
    again = reward_model(config_of(tmp_path / "adapter"))
    assert torch.equal(score(again), score(model))


def test_a_language_models_adapter_gets_a_new_head_which_is_trained_and_saved(folder, tmp_path):
    cfg = config_of(folder, adapter=AdapterConfig(rank=4))
    words = moved(load_model(cfg, CPU))
    save_model(words, load_tokenizer(cfg), tmp_path / "words")
    check_model_folder(config_of(tmp_path / "words"), scores=True)
    model = saved(config_of(tmp_path / "words"), tmp_path / "scores")
    names = set(load_file(tmp_path / "scores" / "adapter_model.safetensors"))
    assert "base_model.model.score.weight" in names
    plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "scores", num_labels=1, pad_token_id=259)
    torch.testing.assert_close(plain_score(plain), score(model), rtol=0, atol=1e-6)


def test_a_head_in_one_of_several_files_is_found(folder, tmp_path):
    model = saved(config_of(folder), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    head = {"score.weight": state.pop("score.weight")}
    (tmp_path / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": state, "model-00002-of-00002.safetensors": head}
    for name, part in files.items():
        save_file(part, tmp_path / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in files.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(score(reward_model(config_of(tmp_path), seed=3)), score(model))
    with pytest.raises(ModelError, match="reward model"):
        check_model_folder(config_of(tmp_path))


def test_a_classifier_of_several_classes_is_refused(folder, tmp_path):
    saved(config_of(folder), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "score.weight": torch.zeros(3, 64)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"score.weight is \[3, 64\], expected \[1, hidden\]"):
        check_model_folder(config_of(tmp_path), scores=True)


def test_a_classifier_whose_head_has_another_name_is_refused(folder, tmp_path):
    saved(config_of(folder), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["classifier.weight"] = state.pop("score.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for scores in (True, False):
        with pytest.raises(ModelError, match=r"score\.weight"):
            check_model_folder(config_of(tmp_path), scores=scores)


def test_a_pad_token_that_ends_sequences_is_told(tmp_path, tiny_qwen, caplog):
    model, tokenizer = reward_model(config_of(tiny_qwen)), load_tokenizer(config_of(tiny_qwen))
    tokenizer.pad_token = tokenizer.eos_token
    with caplog.at_level(logging.WARNING, logger="whet"):
        save_model(model, tokenizer, tmp_path)
    assert "plain transformers takes the score before it" in caplog.text


def test_a_family_without_a_classifier_of_its_own_is_read_again_by_us(tmp_path, tiny_qwen):
    config = {"model_type": "cohere", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260, "pad_token_id": 259}
    torch.manual_seed(0)
    from transformers import CohereConfig

    plain = AutoModelForCausalLM.from_config(
        CohereConfig(**{k: v for k, v in (config | sizes).items() if k != "model_type"})
    )
    tokenizer = load_tokenizer(config_of(tiny_qwen))
    save_model(plain, tokenizer, tmp_path / "words")
    model = saved(config_of(tmp_path / "words"), tmp_path / "scores")
    assert torch.equal(score(reward_model(config_of(tmp_path / "scores"), seed=1)), score(model))
    with pytest.raises(ModelError, match="reward model"):
        check_model_folder(config_of(tmp_path / "scores"))
