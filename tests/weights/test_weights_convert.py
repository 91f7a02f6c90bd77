"""Conversion: the same model on the other side, to the bit, in little memory, and clear words where it cannot be."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from whet import cli
from whet.checkpoints.save import write as write_checkpoint
from whet.config.model import AdapterConfig, ModelConfig
from whet.errors import CheckpointError, ModelError
from whet.models.export import save_model
from whet.models.load import load_model, load_tokenizer
from whet.models.tiny import make_tiny
from whet.weights import torch_dist
from whet.weights.convert import convert

FAMILIES = ("qwen3", "llama", "glm4", "qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module", params=FAMILIES)
def family(tmp_path_factory, request):
    """A model of each family, in shards with an index."""
    folder = make_tiny(tmp_path_factory.mktemp("family"), family=request.param, tie_embeddings=request.param == "qwen3")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sharded = folder.parent / f"{request.param}-sharded"
    model.save_pretrained(sharded, max_shard_size="200KB")
    tokenizer.save_pretrained(sharded)
    (sharded / "README.md").write_text("# A model\n")
    return sharded


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_way_there_and_back_gives_the_same_files_and_the_same_logits(family, tmp_path):
    there = convert(family, tmp_path / "dist", "torch_dist", verify="logits", options={"shard_gb": 1e-4})
    assert (there.source, there.checked, there.compared.difference) == ("hf", True, 0.0)
    assert len(list((tmp_path / "dist").glob("*.distcp"))) > 3
    back = convert(tmp_path / "dist", tmp_path / "back", "hf", verify="logits")
    assert (back.source, back.num_tensors, back.compared.difference) == ("torch_dist", there.num_tensors, 0.0)
    assert len(list(family.glob("*.safetensors"))) > 1
    assert files_of(tmp_path / "back") == files_of(family)
    AutoModelForCausalLM.from_pretrained(tmp_path / "back", local_files_only=True)


def test_what_is_written_is_loaded_by_torch_distributed_checkpoint(family, tmp_path):
    convert(family, tmp_path / "dist", "torch_dist")
    expected = tensors_of(family)
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(state, checkpoint_id=str(tmp_path / "dist"), no_dist=True)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("key", ["model", None])
def test_the_state_that_training_saved_becomes_the_models_own_tensors(family, tmp_path, key):
    """Under the names of the model in memory, where experts are fused, beside an optimizer's state or alone."""
    state = AutoModelForCausalLM.from_pretrained(family).state_dict()
    state = state if key is None else {key: state, "optimizer": {"state": {"model.embed_tokens.weight": torch.ones(3)}}}
    dcp.save(state, checkpoint_id=str(tmp_path / "saved"), no_dist=True)
    for path in family.glob("*.json"):
        if "index" not in path.name:
            shutil.copy(path, tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "hf", "hf")
    expected, found = tensors_of(family), tensors_of(tmp_path / "hf")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_shards_are_no_larger_than_asked_and_transformers_load_them(tiny_qwen, tmp_path):
    convert(tiny_qwen, tmp_path / "shards", "hf", options={"shard_gb": 1e-4})
    files = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 1.05e5
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(tiny_qwen).values())
    convert(tmp_path / "shards", tmp_path / "one", "hf", options={"shard_gb": 1})
    assert files_of(tmp_path / "one") == files_of(tiny_qwen)
    AutoModelForCausalLM.from_pretrained(tmp_path / "shards")


def test_another_type_is_written_down_and_spares_what_the_architecture_keeps_in_float32(tmp_path):
    source = make_tiny(tmp_path / "source", family="deepseek_v3")
    done = convert(source, tmp_path / "half", "torch_dist", dtype="bfloat16", verify="logits")
    assert 0 < done.compared.difference < 0.1 * done.compared.largest
    convert(tmp_path / "half", tmp_path / "hf", "hf")
    kinds = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "hf").items()}
    kept = {name for name, kind in kinds.items() if kind != torch.bfloat16}
    assert kept and all(name.endswith("e_score_correction_bias") for name in kept)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == torch.bfloat16


def test_types_that_would_spoil_the_numbers_are_refused(tiny_qwen, tmp_path):
    source = shutil.copytree(tiny_qwen, tmp_path / "source")
    tensors = tensors_of(source)
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight has numbers beyond the reach of torch\.float16"):
        convert(source, tmp_path / "out", "hf", dtype="float16")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised, and --dtype would spoil them"):
        convert(source, tmp_path / "out", "hf", dtype="bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_checkpoint_of_a_run_loses_its_state_and_keeps_its_model(tiny_qwen, tmp_path):
    def fill(folder):
        shutil.copytree(tiny_qwen, folder, dirs_exist_ok=True)
        save_file({"step": torch.ones(1)}, folder / "optimizer.safetensors")
        (folder / "loop.json").write_text("{}")

    checkpoint = write_checkpoint(tmp_path, 3, fill)
    convert(checkpoint, tmp_path / "dist", "torch_dist")
    convert(tmp_path / "dist", tmp_path / "hf", "hf")
    assert files_of(tmp_path / "hf") == files_of(tiny_qwen)
    (checkpoint / "complete.json").unlink()
    with pytest.raises(ModelError, match="not written to its end; take an earlier checkpoint"):
        convert(checkpoint, tmp_path / "again", "hf")
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"holds checkpoints and is none; give .*checkpoint-3"):
        convert(tmp_path / "run", tmp_path / "again", "hf")


def test_an_adapter_is_merged_when_asked_and_explained_when_not(tiny_qwen, tmp_path):
    cfg = ModelConfig(path=str(tiny_qwen), adapter=AdapterConfig(rank=4))
    model = load_model(cfg, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_model(model, load_tokenizer(cfg), tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"holds an adapter.*with --merge.*whet merge"):
        convert(tmp_path / "adapter", tmp_path / "out", "torch_dist")
    convert(tmp_path / "adapter", tmp_path / "dist", "torch_dist", merge=True)
    convert(tmp_path / "dist", tmp_path / "hf", "hf")
    tokens = torch.tensor([[3, 14, 15, 92, 65]])
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="holds no adapter"):
        convert(tiny_qwen, tmp_path / "out", "hf", merge=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "dist", "hf"]


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_weights_are_read_as_tensors_alone(tiny_qwen, tmp_path):
    source = shutil.copytree(tiny_qwen, tmp_path / "bin")
    tensors = tensors_of(source)
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    convert(source, tmp_path / "hf", "hf")
    assert files_of(tmp_path / "hf") == files_of(tiny_qwen)
    torch.save({"model.norm.weight": Harmful(tmp_path / "ran")}, source / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot be read as tensors alone.*code in it is not run"):
        convert(source, tmp_path / "out", "hf")
    assert not (tmp_path / "ran").exists()


def test_metadata_that_would_run_code_is_refused(tiny_qwen, tmp_path):
    convert(tiny_qwen, tmp_path / "dist", "torch_dist")
    (tmp_path / "dist" / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    with pytest.raises(ModelError, match=r"\.metadata asks to run .*open"):
        convert(tmp_path / "dist", tmp_path / "out", "hf")
    # A dotted name reaches through a module that is allowed.
    place, name = b"torch.distributed.checkpoint.filesystem", b"os.system"
    words = b"".join(b"\x8c" + bytes([len(word)]) + word for word in (place, name))
    (tmp_path / "dist" / ".metadata").write_bytes(b"\x80\x04" + words + b"\x93\x8c\x02id\x85R.")
    with pytest.raises(ModelError, match=r"asks to run torch\.distributed\.checkpoint\.filesystem\.os\.system"):
        convert(tmp_path / "dist", tmp_path / "out", "hf")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def dist(tiny_qwen, tmp_path):
    convert(tiny_qwen, tmp_path / "dist", "torch_dist", options={"shard_gb": 1e-4})
    return tmp_path / "dist"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "without its end": (lambda d: (d / ".metadata").unlink(), "was not written to its end"),
    "half its description": (lambda d: os.truncate(d / ".metadata", 100), r"\.metadata cannot be read"),
    "a file missing": (lambda d: (d / "__1_0.distcp").unlink(), r"__1_0\.distcp is missing"),
    "a file cut short": (lambda d: os.truncate(d / "__1_0.distcp", 99), r"__1_0\.distcp has 99 bytes, expected"),
    "a bit flipped": (lambda d: flip_a_bit(d / "__0_0.distcp"), "its checksum differs"),
    "without configuration": (lambda d: (d / "config.json").unlink(), "it holds weights alone; copy config.json"),
}


@pytest.mark.parametrize("damage,said", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused_by_what_is_wrong_with_it(dist, tmp_path, damage, said):
    damage(dist)
    with pytest.raises(ModelError, match=said):
        convert(dist, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_folders_that_will_not_do_are_named_with_what_they_are(tiny_qwen, tmp_path):
    source = shutil.copytree(tiny_qwen, tmp_path / "cut")
    os.truncate(source / "model.safetensors", 1000)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    (tmp_path / "text.txt").write_text("")
    cases = [
        (source, "out", "damaged or cut short (1000 bytes)"),
        (tmp_path / "empty", "out", "(it is empty)"),
        (tmp_path / "full", "out", "(it holds a)"),
        (tmp_path / "text.txt", "out", "is a file; give the folder of a model"),
        (tmp_path / "nowhere", "out", "is not there; give the folder of a model"),
        (tiny_qwen, "full", "is not empty; name a new folder"),
        (tiny_qwen, "text.txt", "is a file; name a new folder"),
        (tiny_qwen, tiny_qwen / "inside", "lies within"),
    ]
    for origin, output, said in cases:
        with pytest.raises(ModelError, match=re.escape(said)):
            convert(origin, tmp_path / output, "torch_dist")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_refused_before_and_explained_during(tiny_qwen, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ModelError, match=r"will take 0\.00 GB, and 0\.00 GB are free; make room"):
            convert(tiny_qwen, tmp_path / "out", "hf")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_dist, "write_arguments", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; free some space \(.*\)\. Nothing is left"):
        convert(tiny_qwen, tmp_path / "out", "torch_dist")
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_wrong_is_noticed_and_not_left(tiny_qwen, tmp_path, monkeypatch):
    monkeypatch.setattr("whet.weights.tensor_file.as_bytes", lambda tensor: bytes(tensor.nbytes))
    with pytest.raises(ModelError, match=r"does not hold what was read: \d+ tensors differ"):
        convert(tiny_qwen, tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []
    convert(tiny_qwen, tmp_path / "out", "hf", verify="none")


def test_logits_that_do_not_fit_are_refused_before_anything_is_written(tiny_qwen, tmp_path):
    with pytest.raises(ModelError, match=r"loads the whole model, 0\.0 GB, and 0\.0 GB of memory are free"):
        convert(tiny_qwen, tmp_path / "out", "hf", verify="logits", memory_bytes=1000)
    assert not (tmp_path / "out").exists()


PEAK = """
import sys
from pathlib import Path
from whet.weights.convert import convert
from whet.weights import hf, torch_dist

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

root = Path(sys.argv[1])
before = peak()
done = convert(root / "source", root / "dist", "torch_dist")
convert(root / "dist", root / "back", "hf")
print(done.num_bytes, peak() - before)
"""


def test_memory_is_that_of_a_few_tensors_however_large_the_model(tmp_path):
    source = make_tiny(
        tmp_path / "source", hidden_size=512, num_layers=24, num_heads=8, num_kv_heads=8, head_dim=64,
        intermediate_size=2048, vocab_size=4096,
    )  # fmt: skip
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()
    num_bytes, grown = int(told[-2]), int(told[-1])
    assert num_bytes > 4e8
    assert grown < 64e6, f"{grown / 1e6:.0f} MB for {num_bytes / 1e6:.0f} MB of weights"
    assert files_of(tmp_path / "back") == files_of(source)


def test_the_command_says_what_it_did(tiny_qwen, tmp_path, capsys):
    arguments = ["convert", str(tiny_qwen), str(tmp_path / "dist"), "--to", "torch_dist", "--verify", "logits"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"{tiny_qwen} (hf) -> {tmp_path / 'dist'} (torch_dist): 24 tensors, 0.000461 GB, read back and equal" in out
    assert "largest difference of logits: 0 (they reach 1.4)" in out
    assert cli.main(arguments) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    assert cli.main([*arguments[:2], str(tmp_path / "b"), "--to", "hf", "--base", "x"]) == 2
    for size in ("0", "nan", "inf"):
        assert cli.main([*arguments[:2], str(tmp_path / "b"), "--to", "hf", "--shard-gb", size]) == 2
