"""Merging: what plain transformers load gives what the adapter gave, and how much it differs is said."""

import json
import os
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from whet import cli
from whet.config.model import AdapterConfig, ModelConfig, QuantizationConfig
from whet.errors import ModelError
from whet.merge import merge, merge_folder
from whet.models.export import save_model
from whet.models.load import load_model, load_tokenizer
from whet.models.parts import decoder, score_head
from whet.models.tiny import make_tiny

CPU = torch.device("cpu")
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89]])


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def base(tmp_path_factory, request):
    return make_tiny(tmp_path_factory.mktemp("base"), family=request.param, tie_embeddings=request.param == "qwen3")


def adapted(base, *, scores=False, dtype="float32", quantization=None, **options):
    """A model with an adapter that does something."""
    adapter = AdapterConfig(rank=4, **options)
    cfg = ModelConfig(path=str(base), adapter=adapter, dtype=dtype, quantization=quantization)
    torch.manual_seed(0)
    model = load_model(cfg, CPU, scores=scores)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(base, folder, **options):
    model = adapted(base, **options)
    save_model(model, load_tokenizer(ModelConfig(path=str(base))), folder)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


def plain_of(folder, kind=AutoModelForCausalLM):
    return kind.from_pretrained(folder).eval()


KINDS = [{}, {"rslora": True}, {"dora": True}, {"init": "pissa"}, {"init": "olora", "dora": True}]


@pytest.mark.parametrize("options", KINDS)
def test_every_kind_becomes_plain_weights_and_what_that_changed_is_measured(base, options):
    model = adapted(base, **options)
    before = logits(model)
    original = AutoModelForCausalLM.from_pretrained(base)
    plain, difference, largest = merge(model)
    assert type(plain) is type(original)
    assert set(plain.state_dict()) == set(original.state_dict())
    assert 0 < difference < 1e-5 < largest
    torch.testing.assert_close(logits(plain), before, rtol=0, atol=1e-5)
    assert (logits(plain) - logits(original)).abs().max() > 1e-2


def test_merging_in_16_bits_reports_its_rounding(base):
    _, difference, _ = merge(adapted(base, dtype="bfloat16"))
    assert 1e-4 < difference < 0.5


def test_a_wrong_merge_would_be_seen(base, monkeypatch):
    model = adapted(base)
    monkeypatch.setattr(type(model.base_model), "merge_and_unload", lambda self, **_: self.unload())
    _, difference, largest = merge(model)
    assert difference > 0.1 * largest


def test_weights_that_are_not_finite_are_refused(base):
    model = adapted(base)
    next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"cannot be merged.*earlier checkpoint"):
        merge(model)


def test_quantised_weights_are_refused_with_the_way_out(base):
    with pytest.raises(ModelError, match=r"into quantised weights.*whet merge ADAPTER OUTPUT"):
        merge(adapted(base, quantization=QuantizationConfig()))


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}])
def test_a_folder_is_merged_for_plain_transformers(base, tmp_path, options):
    model = saved(base, tmp_path / "adapter", **options)
    merged = merge_folder(tmp_path / "adapter", tmp_path / "merged")
    assert (merged.base, merged.dtype, merged.outputs) == (str(base), "float32", "logits")
    assert 0 < merged.difference < 1e-5
    torch.testing.assert_close(logits(plain_of(tmp_path / "merged")), logits(model), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_reward_models_adapter_is_merged_with_its_score_head(base, tmp_path):
    model = saved(base, tmp_path / "adapter", scores=True)
    merged = merge_folder(tmp_path / "adapter", tmp_path / "merged")
    assert merged.outputs == "scores" and merged.difference < 1e-4 < merged.largest
    with torch.no_grad():
        hidden = decoder(model)(input_ids=TOKENS, use_cache=False).last_hidden_state
        expected = score_head(model)(hidden[:, -1])
    plain = plain_of(tmp_path / "merged", AutoModelForSequenceClassification)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)


def test_an_adapter_of_quantised_training_is_merged_into_the_plain_base(base, tmp_path):
    saved(base, tmp_path / "adapter", quantization=QuantizationConfig())
    assert merge_folder(tmp_path / "adapter", tmp_path / "merged").difference < 1e-5
    on_plain = logits(load_model(ModelConfig(path=str(tmp_path / "adapter")), CPU).eval())
    torch.testing.assert_close(logits(plain_of(tmp_path / "merged")), on_plain, rtol=0, atol=1e-5)


def test_the_dtype_is_the_bases_own_or_the_one_asked_for(base, tmp_path):
    saved(base, tmp_path / "adapter")
    assert merge_folder(tmp_path / "adapter", tmp_path / "half", dtype="bfloat16").dtype == "bfloat16"
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    # The adapter of a base that is kept in 16 bits.
    save_model(AutoModelForCausalLM.from_pretrained(base), load_tokenizer(ModelConfig(path=str(base))),
               tmp_path / "base", dtype=torch.bfloat16)  # fmt: skip
    assert merge_folder(tmp_path / "adapter", tmp_path / "own", base_model=str(tmp_path / "base")).dtype == "bfloat16"


def test_a_base_that_moved_is_named(base, tmp_path):
    model = saved(base, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    gone = {**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "gone")}
    config.write_text(json.dumps(gone))
    with pytest.raises(ModelError, match="gone"):
        merge_folder(tmp_path / "adapter", tmp_path / "merged")
    merged = merge_folder(tmp_path / "adapter", tmp_path / "merged", base_model=str(base))
    assert merged.base == str(base)
    torch.testing.assert_close(logits(plain_of(tmp_path / "merged")), logits(model), rtol=0, atol=1e-5)


def test_folders_that_will_not_do_are_refused_before_anything_is_loaded(base, tmp_path, monkeypatch):
    saved(base, tmp_path / "adapter")
    monkeypatch.setattr("whet.merge.load_model", lambda *_, **__: pytest.fail("weights were read"))
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    cases = [
        (base, tmp_path / "out", "holds a complete model, with nothing to merge"),
        (tmp_path / "nowhere", tmp_path / "out", "holds no adapter; give the folder of an adapter"),
        (tmp_path / "adapter", tmp_path / "full", "is not empty; name a new folder"),
        (tmp_path / "adapter", tmp_path / "adapter", "is not empty; name a new folder"),
        (tmp_path / "adapter", tmp_path / "file", "is a file; name a new folder"),
    ]
    for adapter, output, said in cases:
        with pytest.raises(ModelError, match=re.escape(said)):
            merge_folder(adapter, output)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ModelError, match="is not writable; name another folder"):
        merge_folder(tmp_path / "adapter", tmp_path / "out")


def test_the_command_says_what_it_did(base, tmp_path, capsys):
    model = saved(base, tmp_path / "adapter")
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert f"merged into {base}: {tmp_path / 'merged'}, float32" in out
    found = re.search(r"largest difference of logits with the adapter and merged: (\S+) \(they reach (\S+)\)", out)
    assert 0 < float(found[1]) < 1e-5 < float(found[2])
    torch.testing.assert_close(logits(plain_of(tmp_path / "merged")), logits(model), rtol=0, atol=1e-5)
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 2
    assert "is not empty" in capsys.readouterr().err
