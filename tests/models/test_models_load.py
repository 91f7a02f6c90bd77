"""Loading, and what is said when it cannot be done."""

import json
import logging
import shutil
import socket

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from whet.config.model import AdapterConfig, FreezeConfig, ModelConfig
from whet.errors import ModelError
from whet.models.export import save_model
from whet.models.load import check_model_folder, dropouts, load_model, load_tokenizer, stop_token_ids
from whet.models.tiny import make_tiny

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return make_tiny(tmp_path / "model")


def config_of(folder, **more):
    return ModelConfig(path=str(folder), **more)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(call, *words):
    with pytest.raises(ModelError) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_model_has_the_dtype_asked_for(tmp_path, family, dtype):
    cfg = config_of(make_tiny(tmp_path, family=family), dtype=dtype)
    check_model_folder(cfg)
    model = load_model(cfg, CPU)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert all(p.requires_grad for p in model.parameters())


def test_adapter_and_freezing_are_applied(folder):
    cfg = config_of(folder, adapter=AdapterConfig(rank=4), freeze=FreezeConfig(layers=1))
    trained = [name for name, p in load_model(cfg, CPU).named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name and "layers.1." in name for name in trained)


def test_adapter_folder_is_loaded_on_its_base_and_can_be_trained_on(folder, tmp_path):
    cfg = config_of(folder, adapter=AdapterConfig(rank=4))
    model, tokenizer = load_model(cfg, CPU), load_tokenizer(cfg)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_model(model, tokenizer, tmp_path / "adapter")
    check_model_folder(config_of(tmp_path / "adapter"))
    again = load_model(config_of(tmp_path / "adapter"), CPU)
    tokens = torch.arange(9)[None]
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)
    assert any(p.requires_grad for p in again.parameters())
    both = config_of(tmp_path / "adapter", adapter=AdapterConfig())
    refused(lambda: load_model(both, CPU), "model.adapter", "merge")
    shutil.rmtree(folder)
    refused(lambda: load_model(config_of(tmp_path / "adapter"), CPU), str(folder))


def test_missing_folder_is_named_in_full(tmp_path):
    refused(lambda: check_model_folder(config_of(tmp_path / "nowhere")), str(tmp_path / "nowhere"), "no folder")
    (tmp_path / "file").write_text("")
    refused(lambda: check_model_folder(config_of(tmp_path / "file")), "a file", "config.json")


def test_folder_that_is_not_there_is_looked_for_beside_it(tmp_path):
    (tmp_path / "models" / "qwen3-small").mkdir(parents=True)
    wrong = tmp_path / "models" / "qwen3-smal"
    refused(lambda: check_model_folder(config_of(wrong)), f"did you mean {tmp_path / 'models' / 'qwen3-small'}?")
    deep = tmp_path / "model" / "qwen3-small"
    refused(lambda: check_model_folder(config_of(deep)), f"did you mean {tmp_path / 'models' / 'qwen3-small'}?")
    message = refused(lambda: check_model_folder(config_of(tmp_path / "models" / "zzz")), "correct the path")
    assert "did you mean" not in message


def test_folder_without_config_says_what_it_holds(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    refused(lambda: check_model_folder(config_of(tmp_path)), "no config.json", "it holds model.safetensors")


def test_folder_with_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text("{")
    refused(lambda: check_model_folder(config_of(folder)), "not a valid JSON")


def test_folder_without_tokenizer_is_refused_by_check_and_load(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    for call in (check_model_folder, load_tokenizer):
        refused(lambda call=call: call(config_of(folder)), "no tokenizer", "copy tokenizer.json")


def test_unreadable_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    refused(lambda: load_tokenizer(config_of(folder)), "tokenizer cannot be loaded")


def test_folder_without_weights_is_refused_by_check_and_load(folder):
    (folder / "model.safetensors").unlink()
    refused(lambda: check_model_folder(config_of(folder)), "no weights", "model.safetensors")
    refused(lambda: load_model(config_of(folder), CPU), "no weights")


def test_half_a_download_is_found_out(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(lambda: check_model_folder(config_of(folder)), "cut short", str(weights))
    weights.write_bytes(b"")
    refused(lambda: check_model_folder(config_of(folder)), "(0 bytes)")


def test_missing_shard_is_named(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")
    message = refused(lambda: check_model_folder(config_of(folder)), "model-00002-of-00002.safetensors")
    assert "00001" not in message


def test_weights_that_are_not_there_are_not_made_up(folder):
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: load_model(config_of(folder), CPU), "lack 1 of", "model.layers.1.mlp.up_proj.weight")


def test_weights_of_another_shape_are_refused(folder):
    edit_json(folder / "config.json", intermediate_size=96)
    refused(lambda: load_model(config_of(folder), CPU), "weights cannot be loaded")


@pytest.mark.parametrize("kind", ["bert", "t5", "roberta"])
def test_encoders_are_no_causal_language_models(folder, kind):
    edit_json(folder / "config.json", model_type=kind)
    refused(lambda: check_model_folder(config_of(folder)), repr(kind), "no causal language model")
    refused(lambda: load_model(config_of(folder), CPU), "no causal language model")


def test_unknown_model_type_is_refused(folder):
    edit_json(folder / "config.json", model_type="brandnew")
    refused(lambda: check_model_folder(config_of(folder)), "brandnew")


def test_quantised_weights_are_refused(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(lambda: check_model_folder(config_of(folder)), "quantised (gptq)", "with model.quantization")


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub at a port that nobody listens on, and an empty cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return endpoint


def test_hub_name_out_of_reach_says_what_was_tried(no_hub):
    cfg = config_of("some/model")
    for call in (check_model_folder, load_tokenizer, lambda cfg: load_model(cfg, CPU)):
        refused(lambda call=call: call(cfg), "'some/model'", "no folder", f"{no_hub} cannot be reached", "hf download")


def test_hub_name_in_offline_mode_says_so(no_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: check_model_folder(config_of("some/model")), "HF_HUB_OFFLINE is set")


def test_chat_template_comes_from_the_setting_or_a_file(folder, tmp_path):
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)
    for given in (template, str(tmp_path / "mine.jinja")):
        tokenizer = load_tokenizer(config_of(folder, chat_template=given))
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"


def test_broken_chat_templates_are_refused(folder, tmp_path):
    def load(template):
        return lambda: load_tokenizer(config_of(folder, chat_template=template))

    refused(load(str(tmp_path / "none.jinja")), "model.chat_template", "none.jinja", "no file")
    refused(load("{# fine #}\n{% for m in messages %}"), "line 2", "endfor")
    refused(load("{{ bos_token }}"), "leaves out the message")
    (folder / "chat_template.jinja").write_text("{% if %}")
    refused(lambda: check_model_folder(config_of(folder)), str(folder), "line 1")


def test_template_that_refuses_a_conversation_is_accepted(folder):
    picky = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    assert load_tokenizer(config_of(folder, chat_template=picky)).chat_template == picky


def test_tokenizer_larger_than_the_embedding_is_refused(folder):
    edit_json(folder / "config.json", vocab_size=200)
    refused(lambda: check_model_folder(config_of(folder)), "259", "200 rows")


def test_unused_special_token_beyond_the_embedding_is_only_told(folder, caplog):
    tokenizer = load_tokenizer(config_of(folder))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    with caplog.at_level(logging.WARNING, logger="whet"):
        check_model_folder(config_of(folder))
    assert "no row for <image>" in caplog.text


def test_pad_token_is_set_and_is_not_the_end_token(folder, caplog):
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    assert load_tokenizer(config_of(folder)).pad_token == "<|pad|>"
    edit_json(folder / "tokenizer_config.json", pad_token="<|im_end|>")
    with caplog.at_level(logging.WARNING, logger="whet"):
        assert load_tokenizer(config_of(folder)).pad_token == "<|im_end|>"
    assert "both pad and end token" in caplog.text


@pytest.mark.parametrize(
    ("words", "pad"), [(["<|endoftext|>", "<unk>"], "<unk>"), (["<|endoftext|>"], "<|endoftext|>")]
)
def test_pad_token_is_the_end_token_only_where_there_is_no_other_and_says_so(folder, caplog, words, pad):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "a"])}, unk_token=words[-1]))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(folder)
    with caplog.at_level(logging.WARNING, logger="whet"):
        assert load_tokenizer(config_of(folder)).pad_token == pad
    assert ("both pad and end token" in caplog.text) == (pad == "<|endoftext|>")


def test_stop_tokens_are_those_of_tokenizer_and_generation_config(folder):
    model, tokenizer = load_model(config_of(folder), CPU), load_tokenizer(config_of(folder))
    assert stop_token_ids(model, tokenizer) == (258, 256)
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == (258,)
    model.config.eos_token_id = tokenizer.eos_token = None
    refused(lambda: stop_token_ids(model, tokenizer), "end-of-sequence", "tokenizer_config.json")


def test_dropout_is_reported(folder, caplog):
    edit_json(folder / "config.json", attention_dropout=0.1)
    with caplog.at_level(logging.WARNING, logger="whet"):
        model = load_model(config_of(folder), CPU)
    assert dropouts(model) == {"attention_dropout": 0.1}
    assert "attention_dropout = 0.1" in caplog.text


def test_temperature_without_sampling_does_not_spoil_the_export(folder, tmp_path):
    edit_json(folder / "generation_config.json", temperature=0.6, top_p=0.9)
    model = load_model(config_of(folder), CPU)
    model.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.6, 0.9)
