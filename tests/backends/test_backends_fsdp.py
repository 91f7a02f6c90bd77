"""What the fsdp backend refuses, and the models without weights that its ranks begin with; its training is held
against that of `local` in tests/contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from whet.backends.divides import check_divides
from whet.config.backend import BackendConfig
from whet.config.loader import from_values
from whet.config.model import AdapterConfig, ModelConfig
from whet.errors import CheckpointError, ConfigError
from whet.models.export import save_model
from whet.models.load import load_model, load_tokenizer
from whet.models.restore import load_weights, saved_weights
from whet.models.tiny import make_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("moe"), family="qwen3_moe")


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"tensor_parallel": 3}, "tensor_parallel is 3, but qwen3_moe has 4 heads"),
        ({"tensor_parallel": 4}, "has 2 heads of keys and values"),
        ({"context_parallel": 3}, "each rank has 4 heads"),
        ({"tensor_parallel": 2, "context_parallel": 4}, "each rank has 2 heads"),
        ({"expert_parallel": 3}, "has 8 experts"),
    ],
)
def test_what_does_not_divide_is_refused_by_the_configuration_alone(moe: Path, settings: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        check_divides(AutoConfig.from_pretrained(moe), BackendConfig(**settings))


def test_what_divides_is_let_through(moe: Path, tiny_qwen: Path):
    config = AutoConfig.from_pretrained(moe)
    for settings in (
        {},
        {"tensor_parallel": 2, "context_parallel": 2},
        {"context_parallel": 4},
        {"expert_parallel": 8},
    ):
        check_divides(config, BackendConfig(**settings))
    with pytest.raises(ConfigError, match="no experts"):
        check_divides(AutoConfig.from_pretrained(tiny_qwen), BackendConfig(expert_parallel=2))


@pytest.mark.parametrize(
    "values,setting,said",
    [
        ({"model": {"quantization": {"bits": 4}, "adapter": {}}}, "model.quantization", "deepspeed"),
        ({"backend": {"precision": "fp16"}}, "backend.precision", "bf16"),
        ({"backend": {"context_parallel": 2}, "model": {"attention": "rows"}}, "backend.context_parallel", "slices"),
        ({"backend": {"tensor_parallel": 2}, "model": {"adapter": {"dora": True}}}, "backend.tensor_parallel", "dora"),
        (
            {"backend": {"tensor_parallel": 2}, "model": {"adapter": {"init": "pissa"}}},
            "backend.tensor_parallel",
            "init",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values: dict, setting: str, said: str):
    given = {
        "model": {"path": "m", **values.get("model", {})},
        "backend": {"use": "fsdp", **values.get("backend", {})},
        "data": {"train": "d"},
        "cluster": {"num_processes": 2},
    }
    with pytest.raises(ConfigError) as caught:
        from_values(given, method="sft", where="the test")
    assert setting in str(caught.value) and said in str(caught.value)


def shapes(model) -> dict[str, tuple]:
    return {name: (tuple(w.shape), w.dtype, w.requires_grad) for name, w in model.named_parameters()}


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=4), AdapterConfig(rank=4, init="pissa")])
@pytest.mark.parametrize("scores", [False, True])
def test_a_hollow_model_is_the_same_but_for_its_weights(tiny_qwen: Path, adapter, scores: bool):
    cfg = ModelConfig(path=str(tiny_qwen), adapter=adapter)
    torch.manual_seed(3)
    whole = load_model(cfg, CPU, scores=scores)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    hollow = load_model(cfg, CPU, scores=scores, hollow=True)
    assert torch.equal(torch.rand(1), drawn), "both take the same random numbers"
    assert shapes(hollow) == shapes(whole)
    for (name, ours), (other, theirs) in zip(hollow.named_buffers(), whole.named_buffers(), strict=True):
        assert name == other
        assert name.endswith("fixed") or torch.equal(ours, theirs)
    plain = [w for name, w in hollow.named_parameters() if "lora" not in name and "score" not in name]
    assert {w.untyped_storage().nbytes() for w in plain} == {4}, "one number stands for all"
    for name, weight in hollow.named_parameters():
        if "score" in name or ("lora" in name and adapter is not None and adapter.init == "default"):
            assert torch.equal(weight, whole.get_parameter(name)), name


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=4), AdapterConfig(rank=4, init="pissa")])
@pytest.mark.parametrize("scores", [False, True])
def test_saved_weights_are_read_under_the_names_of_the_model(
    moe: Path, tiny_qwen: Path, tmp_path: Path, adapter, scores: bool
):
    cfg = ModelConfig(path=str(tiny_qwen if adapter else moe), adapter=adapter)
    torch.manual_seed(3)
    model = load_model(cfg, CPU, scores=scores)
    for weight in model.parameters():
        weight.data.add_(0.01)
    save_model(model, load_tokenizer(cfg), tmp_path)
    found = saved_weights(load_model(cfg, CPU, scores=scores, hollow=True), tmp_path)
    own = {name: w for name, w in model.named_parameters() if adapter is None or w.requires_grad}
    if scores:
        own.pop("lm_head.weight", None)
    assert found.keys() >= own.keys()
    for name, weight in own.items():
        assert torch.equal(found[name], weight), name
    again = load_model(cfg, CPU, scores=scores)
    load_weights(again, tmp_path)
    for name, weight in own.items():
        assert torch.equal(again.get_parameter(name), weight), name


def test_weights_of_another_model_are_refused(moe: Path, tiny_qwen: Path):
    hollow = load_model(ModelConfig(path=str(tiny_qwen)), CPU, hollow=True)
    with pytest.raises(CheckpointError, match="unknown"):
        saved_weights(hollow, moe)
