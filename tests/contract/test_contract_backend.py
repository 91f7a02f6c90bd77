"""What every backend that spreads a model over ranks must do: train as `local` does on the same global batches.

One set of processes runs all cases of a backend; each test compares one of them with the same training in one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from tests.contract.training import BACKENDS, Case, make, on_ranks, train
from whet.config.model import ModelConfig
from whet.models.load import load_tokenizer
from whet.models.tiny import make_tiny

ADAPTER = {"rank": 4, "init": "pissa"}
DIVIDED = {"zero_stage": 3, "options": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
"""DeepSpeed leaves weights as small as those of these models whole, unless it is told not to."""
SHORT = (1, 3, 4)
"""Units of the long trainings."""


def settings(**given: Any) -> dict[str, Any]:
    return {"settings": given}


TWO_RANKS: Mapping[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{method}, {name}": ("qwen3", {"method": method, "steps": 20, "units": SHORT, "settings": layout})
        for method in ("sft", "dpo", "grpo")
        for name, layout in {
            "data": {},
            "tensor": {"tensor_parallel": 2},
            "context": {"context_parallel": 2, "micro_batch_size": 2},
            "ZeRO-1": {"zero_stage": 1},
            "ZeRO-3": {**DIVIDED, "micro_batch_size": 2},
        }.items()
    },
    "awkward units, one by one": ("llama", {"method": "grpo", **settings(micro_batch_size=1)}),
    "three units": ("llama", {"units": (0, 4, 5), **settings(micro_batch_size=1)}),
    "one unit": ("qwen3", {"units": (0,)}),
    "nothing trained on one rank": ("qwen3", {"units": (4, 3)}),
    "nothing trained on one rank, divided": ("qwen3", {"units": (4, 3), **settings(**DIVIDED)}),
    "scores": ("llama", {"method": "reward", **settings(context_parallel=2)}),
    "values": ("qwen3", {"method": "values", **settings(tensor_parallel=2)}),
    "adapter": ("qwen3", {"adapter": {"rank": 4}, **settings(tensor_parallel=2)}),
    "adapter of a reward model": ("qwen3", {"method": "reward", "adapter": ADAPTER}),
    "bf16": ("qwen3", {"precision": "bf16", "units": SHORT}),
    "recomputed": ("llama", settings(activation_checkpointing=True, tensor_parallel=2)),
    "kept gathered": ("llama", settings(reshard_after_forward=False)),
    "recomputed, divided": ("llama", settings(activation_checkpointing=True, **DIVIDED)),
    "offloaded": ("llama", settings(offload="all")),
    "offloaded, divided": ("llama", settings(offload="all", **DIVIDED)),
    "optimizer offloaded": ("llama", settings(offload="optimizer")),
    "experts of data ranks": ("qwen3_moe", settings(expert_parallel=2, micro_batch_size=2)),
    "experts of context ranks": ("qwen3_moe", settings(expert_parallel=2, context_parallel=2)),
    "experts recomputed, one unit": ("qwen3_moe", {"units": (3,), **settings(expert_parallel=2)}),
    "latent attention": ("deepseek_v3", settings(tensor_parallel=2)),
    "latent attention, experts": ("deepseek_v3", settings(expert_parallel=2, context_parallel=2)),
    "sinks and windows": ("gpt_oss", settings(context_parallel=2, expert_parallel=2)),
    "fused width": ("glm4", settings(tensor_parallel=2)),
}
KEPT: Mapping[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "weights": ("qwen3", {}, {}, {"tensor_parallel": 2}),
    "before the first step": ("qwen3", {"steps": 1}, {}, {"tensor_parallel": 2}),
    "divided matrices": ("llama", {"method": "values"}, {"tensor_parallel": 2}, {}),
    "adapter": ("qwen3", {"adapter": ADAPTER}, {}, {"context_parallel": 2}),
    "reward model": ("llama", {"method": "reward"}, {}, {"offload": "all"}),
    "experts": ("qwen3_moe", {}, {"expert_parallel": 2}, {}),
    "divided weights": ("qwen3", {}, DIVIDED, {"zero_stage": 1}),
    "divided weights and a head": ("llama", {"method": "values"}, {"zero_stage": 2}, DIVIDED),
    "adapter of divided weights": ("qwen3", {"adapter": ADAPTER}, DIVIDED, {"offload": "optimizer"}),
    "divided reward model": ("llama", {"method": "reward"}, DIVIDED, DIVIDED),
    "divided experts": ("qwen3_moe", {}, DIVIDED, DIVIDED),
}
"""Trainings that are saved under one layout and gone on with under another: model, case, the two layouts."""
FOUR_RANKS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "data, tensor": ("llama", {"method": "dpo", **settings(tensor_parallel=2, micro_batch_size=1)}),
    "context, tensor": ("qwen3", {"method": "grpo", **settings(tensor_parallel=2, context_parallel=2)}),
    "more ranks than heads of keys": ("qwen3", settings(context_parallel=4)),
    "more ranks than units": ("llama", {"method": "grpo", "units": (0, 3, 5)}),
    "more ranks than units, divided": ("llama", {"method": "grpo", "units": (0, 3, 5), **settings(**DIVIDED)}),
    "experts, tensor": ("qwen3_moe", settings(expert_parallel=2, tensor_parallel=2)),
}
OFFERS: Mapping[str, set[str]] = {
    "fsdp": {"tensor_parallel", "context_parallel", "expert_parallel", "offload", "reshard_after_forward"},
    "deepspeed": {"zero_stage", "offload", "options"},
}
"""Settings that a backend has; cases with others are left out for it."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    folder = tmp_path_factory.mktemp("families")
    families = ("qwen3", "llama", "qwen3_moe", "deepseek_v3", "glm4")
    untied = {"llama": {"tie_embeddings": False}}
    made = {one: str(make_tiny(folder / one, family=one, **untied.get(one, {}))) for one in families}
    return {**made, "gpt_oss": make_with_sinks(folder / "gpt_oss", Path(made["qwen3"]))}


def make_with_sinks(folder: Path, other: Path) -> str:
    """A model whose attention has sinks and windows, with the tokenizer of another."""
    config = GptOssConfig(
        **{"vocab_size": 260, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        **{"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "eos_token_id": 258},
        **{"pad_token_id": 259, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config)
    for name, weight in model.named_parameters():
        if "sinks" in name:
            weight.data.normal_(std=0.5)
    model.save_pretrained(folder)
    load_tokenizer(ModelConfig(path=str(other))).save_pretrained(folder)
    return str(folder)


def case_of(models: Mapping[str, str], model: str, given: dict[str, Any]) -> Case:
    return Case(models[model], **{"steps": 3, **given})


def offered(backend: str, given: Mapping[str, Any]) -> bool:
    common = {"micro_batch_size", "activation_checkpointing"}
    return {*given.get("settings", {})} <= OFFERS[backend] | common


def installed(backend: str) -> bool:
    return backend != "deepspeed" or find_spec("deepspeed") is not None


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=pytest.mark.skipif(not installed(name), reason=f"{name} is not installed"))
        for name in BACKENDS
    ],
)
def two(request: pytest.FixtureRequest, models, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What two ranks found, by case."""
    backend, kept = request.param, tmp_path_factory.mktemp("kept")
    chosen = {name: (model, given) for name, (model, given) in TWO_RANKS.items() if offered(backend, given)}
    cases = {name: case_of(models, model, given) for name, (model, given) in chosen.items()}
    for name, (model, given, before, after) in KEPT.items():
        if offered(backend, {"settings": {**before, **after}}):
            case = case_of(models, model, {"steps": 4, **given})
            cases[f"{name} saved"] = replace(case, settings=before, save_to=str(kept / name))
            cases[f"{name} loaded"] = replace(case, settings=after, load_from=str(kept / name))
    return {"backend": backend, "kept": kept, "cases": cases, **on_ranks(backend, cases, 2)}


@pytest.fixture(scope="session")
def four(two, models) -> Mapping[str, Any]:
    """What four ranks found, and what they made of a checkpoint of two."""
    chosen = {name: (model, given) for name, (model, given) in FOUR_RANKS.items() if offered(two["backend"], given)}
    cases = {name: case_of(models, model, given) for name, (model, given) in chosen.items()}
    name = next(name for name in KEPT if f"{name} saved" in two["cases"])
    cases["weights of two"] = replace(two["cases"][f"{name} saved"], save_to=None, load_from=str(two["kept"] / name))
    return {"backend": two["backend"], "cases": cases, **on_ranks(two["backend"], cases, 4)}


@cache
def alone(adapter: tuple, **given: Any) -> dict[str, Any]:
    """The same training in one process."""
    case = Case(adapter=dict(adapter) or None, **given)
    return train(case, make(case))


def assert_same_training(found: Mapping[str, Any], name: str) -> None:
    if name not in found:
        pytest.skip(f"the backend {found['backend']} has no such settings")
    case, ours = found["cases"][name], found[name]
    same = {name: getattr(case, name) for name in ("model", "method", "units", "steps", "precision")}
    local = alone(tuple((case.adapter or {}).items()), **same)
    done = case.steps // 2 if case.load_from else 0
    close = 1e-5 if case.precision == "float32" else 2e-2
    for key in ("outputs", "after"):
        assert ours[key].keys() == local[key].keys()
        for output, values in local[key].items():
            assert torch.allclose(ours[key][output], values, atol=10 * close if key == "after" else close), (
                key,
                output,
            )
    assert ours["losses"] == pytest.approx(local["losses"][done:], abs=close)
    assert ours["norms"] == pytest.approx(local["norms"][done:], rel=10 * close)
    for own, other in zip(ours["metrics"], local["metrics"][done:], strict=True):
        assert own == pytest.approx(other, rel=100 * close, abs=10 * close)
    assert ours["weights"].keys() == local["weights"].keys()
    # Not number by number: Adam makes whole steps of gradients that are nothing but rounding.
    apart, whole = (
        torch.stack([f(weight, values).norm() for weight, values in local["weights"].items()]).norm()
        for f in (lambda weight, values: ours["weights"][weight] - values, lambda _, values: values)
    )
    assert apart <= 10 * close * whole


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_train_as_one_process_does(two, name):
    assert_same_training(two, name)


@pytest.mark.parametrize("name", KEPT)
def test_training_goes_on_under_another_layout_as_if_it_had_not_stopped(two, name):
    assert_same_training(two, f"{name} saved")
    assert_same_training(two, f"{name} loaded")


@pytest.mark.parametrize("name", [*FOUR_RANKS, "weights of two"])
def test_four_ranks_train_as_one_process_does(four, name):
    assert_same_training(four, name)


@pytest.mark.parametrize("name", KEPT)
def test_a_checkpoint_of_ranks_is_one_of_a_single_process(two, models, name, tmp_path: Path):
    """The same files with the same weights, and a local backend goes on from them but for the optimizer."""
    model, given, _, _ = KEPT[name]
    if f"{name} saved" not in two:
        pytest.skip(f"the backend {two['backend']} has no such settings")
    case = case_of(models, model, {**given, "steps": 0})
    local = make(case)
    local.export_weights(tmp_path)
    ours = {path.relative_to(two["kept"] / name).as_posix() for path in (two["kept"] / name).rglob("*.*")}
    theirs = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert theirs <= ours
    for path in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        if path not in theirs:  # an adapter has no configuration of a model
            continue
        assert (two["kept"] / name / path).read_text() == (tmp_path / path).read_text(), path
