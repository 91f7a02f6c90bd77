"""Models in Megatron-Core's terms: which weights become which, and checkpoints in its form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen3Config

from whet.errors import ModelError
from whet.models.tiny import FAMILIES, make_tiny
from whet.weights.convert import convert
from whet.weights.hf import open_folder
from whet.weights.megatron.blueprint import blueprint
from whet.weights.megatron.names import join, part, separate, weights_of, whole


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        family: make_tiny(root / family, family=family, num_layers=3, tie_embeddings=family == "qwen3")
        for family in FAMILIES
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_has_one_place_in_megatron(family: str, folders):
    model = blueprint(AutoConfig.from_pretrained(folders[family]))
    weights = list(weights_of(model))
    sources = [source for weight in weights for source in weight.sources]
    assert sorted(sources) == sorted(open_folder(folders[family]).entries)
    assert len({(weight.key, weight.index) for weight in weights}) == len(weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_from_megatrons_checkpoint_byte_for_byte(family: str, folders, tmp_path: Path):
    done = convert(folders[family], tmp_path / "mcore", "megatron", verify="logits")
    assert done.compared is not None and done.compared.difference == 0
    assert convert(tmp_path / "mcore", tmp_path / "back", "hf").source == "megatron"
    names = {path.name for path in folders[family].iterdir()}
    assert names == {path.name for path in (tmp_path / "back").iterdir()}
    assert all((tmp_path / "back" / name).read_bytes() == (folders[family] / name).read_bytes() for name in names)


def test_layers_that_are_alike_are_one_tensor_and_others_are_not(folders, tmp_path: Path):
    convert(folders["qwen3_moe"], tmp_path / "alike", "megatron")
    kept = FileSystemReader(tmp_path / "alike" / "release").read_metadata().state_dict_metadata
    assert tuple(kept["decoder.layers.mlp.experts.experts.linear_fc1.weight"].size) == (3, 8, 96, 64)
    assert tuple(kept["decoder.layers.self_attention.linear_qkv.weight"].size) == (3, 128, 64)
    convert(folders["deepseek_v3"], tmp_path / "unlike", "megatron")
    kept = FileSystemReader(tmp_path / "unlike" / "release").read_metadata().state_dict_metadata
    assert tuple(kept["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"].size) == (8, 64, 48)
    assert tuple(kept["decoder.layers.0.mlp.linear_fc1.weight"].size) == (384, 64)


def test_arguments_are_those_that_megatrons_scripts_know(folders, tmp_path: Path):
    convert(folders["qwen3"], tmp_path / "mcore", "megatron")
    assert (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").read_text() == "release"
    about = json.loads((tmp_path / "mcore" / "release" / "metadata.json").read_text())
    assert about["sharded_backend"] == "torch_dist"
    args = torch.load(tmp_path / "mcore" / "release" / "common.pt", weights_only=False)["args"]
    found = (args.num_layers, args.hidden_size, args.num_query_groups, args.kv_channels, args.swiglu, args.rotary_base)
    assert found == (3, 64, 2, 16, True, 10000.0)
    assert args.qk_layernorm and not args.untie_embeddings_and_output_weights and args.norm_epsilon == 1e-6


def test_heads_go_group_by_group_and_rows_of_the_gate_above_those_of_the_other():
    settings = {"num_query_groups": 2, "kv_channels": 1, "num_attention_heads": 4}
    query, key, value = (torch.tensor(x)[:, None] for x in ([0, 1, 2, 3], [10, 11], [20, 21]))
    joined = join("qkv", [query, key, value], settings)
    # Two query heads, then key and value, of the first group; then those of the second.
    assert joined[:, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert [x[:, 0].tolist() for x in separate("qkv", joined, settings)] == [[0, 1, 2, 3], [10, 11], [20, 21]]
    both = join("gate_up", [torch.arange(4)[:, None], 10 + torch.arange(4)[:, None]], settings)
    # A tensor-parallel rank has the same rows of both.
    assert part("gate_up", both, 0, 1, 2)[:, 0].tolist() == [2, 3, 12, 13]
    assert torch.equal(whole("gate_up", [part("gate_up", both, 0, rank, 2) for rank in range(2)], 0), both)
    assert part("same", both, 0, 1, 2)[:, 0].tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize(
    "config,said",
    [
        (Qwen3Config(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (LlamaConfig(attention_bias=True), "biases"),
        (MistralConfig(sliding_window=128), "sliding_window is 128"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'"),
        (AutoConfig.for_model("gemma2"), "a 'gemma2', which there is no map to Megatron-Core for"),
    ],
)
def test_a_model_that_megatron_would_compute_otherwise_is_refused(config, said: str):
    with pytest.raises(ModelError, match=said):
        blueprint(config)


def test_a_folder_that_lacks_what_it_needs_says_so(folders, tmp_path: Path):
    convert(folders["llama"], tmp_path / "mcore", "megatron")
    place = tmp_path / "mcore" / "release"
    (place / "hf" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"has no hf/config\.json"):
        convert(tmp_path / "mcore", tmp_path / "back", "hf")
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 4}
    (place / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="are missing or of another shape"):
        convert(tmp_path / "mcore", tmp_path / "back", "hf")
    (tmp_path / "config.json").rename(place / "hf" / "config.json")
    data = bytearray((place / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (place / "__0_0.distcp").write_bytes(data)
    with pytest.raises(ModelError, match=r"damaged|cannot be read"):
        convert(tmp_path / "mcore", tmp_path / "back", "hf")
    with pytest.raises(ModelError, match="any layout of ranks"):
        convert(folders["llama"], tmp_path / "other", "megatron", options={"tensor_parallel": 2})
