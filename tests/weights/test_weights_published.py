"""What is sent to engines: sums that survive fusing, changes that add up, whole files, names of checkpoints."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from whet.errors import EngineError
from whet.served import _scales
from whet.weights.bits import Sums, differing, of_engine
from whet.weights.buckets import buckets, flat
from whet.weights.checkpoint_names import Naming, adapter_parameters, as_checkpoint
from whet.weights.delta import Deltas
from whet.weights.files import PREFIX, WeightFolder, place_for, sweep, to_dtype


def pairs(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (5, 4),
        "layers.0.q.weight": (4, 4),
        "layers.0.k.weight": (2, 4),
        "layers.1.q.weight": (4, 4),
    }
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


# --- sums ---------------------------------------------------------------------------------------------------


def sums(tensors: dict[str, torch.Tensor]) -> Sums:
    found = Sums()
    for name, tensor in tensors.items():
        found.add(name, tensor)
    return found


def test_sums_are_those_of_the_engine_however_it_arranges_the_same_weights():
    sent = pairs(dtype=torch.bfloat16)
    whole = sums(sent)
    fused = torch.cat([sent["layers.0.q.weight"], sent["layers.0.k.weight"]])
    padded = torch.cat([sent["embed.weight"], torch.zeros(3, 4, dtype=torch.bfloat16)])
    ranks = []
    for part in range(2):  # columns are cut up, the last layer is copied
        held = {
            "layers.0.qk.weight": fused[:, part * 2 : part * 2 + 2].t(),
            "layers.1.q.weight": sent["layers.1.q.weight"],
        }
        held["embed.weight"] = padded[part * 4 : part * 4 + 4]
        ranks.append({name: (sum_of(one), one.numel()) for name, one in held.items()})
    assert differing(whole, of_engine(ranks)) == ([], 3)


def sum_of(tensor: torch.Tensor) -> int:
    return int(tensor.contiguous().view(torch.int16).long().sum())


def test_one_other_bit_is_seen():
    sent = pairs()
    held = {name: tensor.clone() for name, tensor in sent.items()}
    held["layers.0.k.weight"].view(torch.int32)[1, 2] ^= 1
    ranks = [{name: (int(t.view(torch.int32).long().sum()), t.numel()) for name, t in held.items()}]
    assert differing(sums(sent), of_engine(ranks)) == (["layers.0"], 3)


def test_what_the_engine_holds_otherwise_is_not_compared():
    sent = pairs()
    assert differing(sums(sent), of_engine([{"layers.0.q.weight": (1, 16)}])) == ([], 0)


# --- changes ------------------------------------------------------------------------------------------------


def read(data: torch.Tensor, entry: dict, before: torch.Tensor | None) -> torch.Tensor:
    """What a server makes of a change, step by step."""
    raw = torch.frombuffer(bytearray(zlib.decompress(data.numpy().tobytes())), dtype=torch.uint8)
    raw = raw.view(entry["width"], -1).t().contiguous().view(-1)
    if entry["kind"] == "xor":
        assert before is not None
        raw = raw ^ before.contiguous().view(-1).view(torch.uint8)
    assert zlib.crc32(raw.numpy().tobytes()) == entry["crc32"]
    return raw.view(getattr(torch, entry["dtype"])).view(entry["shape"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_add_up_to_the_weights(dtype):
    deltas, held = Deltas(), {}
    for step in range(3):
        now = pairs(seed=1, dtype=dtype)
        for name in now:
            now[name] += step * 1e-3 if "layers.0" in name else 0
        sent = list(deltas.encode(now.items()))
        for name, data, entry in sent:
            held[name] = read(data, entry, held.get(name))
        assert all(torch.equal(held[name], now[name]) for name in now)
        if step:
            assert all("layers.0" in name for name, _, _ in sent)
    assert deltas.raw_bytes == sum(t.numel() * t.element_size() for t in held.values())


def test_a_small_step_of_bfloat16_weights_is_small():
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(512, 512, generator=draw)
    deltas = Deltas()
    whole = sum(len(data) for _, data, _ in deltas.encode([("w", before.bfloat16())]))
    after = before + 1e-6 * torch.randn(512, 512, generator=draw).sign()
    ((_, data, entry),) = deltas.encode([("w", after.bfloat16())])
    assert entry["kind"] == "xor"
    assert len(data) < whole / 20


# --- buckets and files --------------------------------------------------------------------------------------


def test_buckets_hold_what_they_may_and_tensors_that_are_theirs():
    shared = torch.zeros(4)

    def stream():
        for value in range(5):
            shared.fill_(value)
            yield str(value), shared  # valid until the next is asked for

    found = list(buckets(stream(), 40))
    assert [[name for name, _ in bucket] for bucket in found] == [["0", "1"], ["2", "3"], ["4"]]
    assert [tensor.mean().item() for bucket in found for _, tensor in bucket] == [0, 1, 2, 3, 4]
    assert flat(found[0]).dtype == torch.uint8
    assert flat(found[0]).numel() == 32
    assert [len(bucket) for bucket in buckets(iter([("large", torch.zeros(100)), ("small", shared)]), 40)] == [1, 1]


def test_a_folder_is_a_model_that_transformers_loads(tmp_path: Path, tiny_qwen: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    folder = WeightFolder(tmp_path, tiny_qwen)
    named = [(name, one.detach()) for name, one in model.named_parameters()]
    written = folder.write(named, 7, 2**16)
    assert len(written.files) > 1
    assert written.size == sum(one.numel() * 4 for _, one in named)
    again = AutoModelForCausalLM.from_pretrained(written.folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    folder.write(named, 8, 2**30)
    assert sorted(one.name for one in folder.place.iterdir()) == ["v7", "v8"]
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_what_breaks_off_leaves_nothing_that_looks_complete(tmp_path: Path):
    folder = WeightFolder(tmp_path)

    def broken():
        yield "a", torch.zeros(3)
        raise EngineError("a rank is gone")

    with pytest.raises(EngineError, match="a rank is gone"):
        folder.write(broken(), 1, 1)
    assert not (folder.place / "v1").exists()
    folder.close()


def test_what_a_killed_run_has_left_is_swept(tmp_path: Path):
    left, own = tmp_path / f"{PREFIX}999999999-x", tmp_path / f"{PREFIX}1-x"
    left.mkdir()
    own.mkdir()
    sweep(tmp_path)
    assert (left.exists(), own.exists()) == (False, True)


def test_weights_go_where_they_are_told_or_where_there_is_room(tmp_path: Path):
    assert place_for(str(tmp_path / "x"), tmp_path, 1, local=True) == tmp_path / "x"
    assert place_for(None, tmp_path, 2**60, local=True) == tmp_path / "weights"
    assert place_for(None, tmp_path, 1, local=False) == tmp_path / "weights"


def test_only_floating_point_weights_change_their_type():
    found = dict(to_dtype([("a", torch.zeros(2)), ("b", torch.zeros(2, dtype=torch.int64))], torch.bfloat16))
    assert [found["a"].dtype, found["b"].dtype] == [torch.bfloat16, torch.int64]


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged_as_peft_merges_it(tiny_qwen: Path, rslora: bool):
    settings = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False, use_rslora=rslora)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_qwen), settings)
    named = ((name, one.detach()) for name, one in model.named_parameters())
    found = {name: one.clone() for name, one in as_checkpoint(named, Naming(model.get_base_model(), _scales(model)))}
    assert len(_scales(model)) == 14
    merged = dict(model.merge_and_unload().named_parameters())
    assert set(found) == set(merged)
    assert all(torch.allclose(found[name], merged[name], atol=1e-6) for name in found)


def test_adapter_parameters_are_named_as_peft_saves_them(tiny_qwen: Path, tmp_path: Path):
    settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_qwen), settings)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    ours = dict(adapter_parameters((name, one.detach()) for name, one in model.named_parameters()))
    assert set(ours) == set(saved)
    assert all(torch.equal(ours[name], saved[name]) for name in saved)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


def test_an_adapter_that_cannot_be_merged_is_refused(tiny_qwen: Path):
    settings = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_qwen), settings)
    with pytest.raises(EngineError, match=r"adapter_only: true"):
        list(
            as_checkpoint(
                ((name, one.detach()) for name, one in model.named_parameters()), Naming(model.get_base_model())
            )
        )


def test_experts_are_named_as_in_their_checkpoint(tmp_path: Path):
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    ours = dict(as_checkpoint(((name, one.detach()) for name, one in model.named_parameters()), Naming(model)))
    assert set(ours) == set(saved)
    assert all(torch.equal(ours[name], saved[name]) for name in saved)
