"""The numbers of plans: worked by hand, or against what they are reckoned from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.runs import config_of
from whet.check.memory import Held
from whet.check.rehearsal import Micro
from whet.flops import pairs
from whet.hardware import read_machines
from whet.plan.activations import peaks_of
from whet.plan.arrangement import Arrangement
from whet.plan.choose import Planned
from whet.plan.division import Divided, divided
from whet.plan.load import Lengths, load_of
from whet.plan.models import Sized, sized
from whet.plan.serving import cache_parts, concurrent, server_parts, token_bytes
from whet.plan.speed import READING, STEP_S, TRAINING, _decoding_step, _publishing
from whet.tree import build

H100 = read_machines("8xH100-80G")
QWEN = "Qwen/Qwen3-0.6B"


def model(**held: float) -> Sized:
    """A real model's shape with weights of round numbers."""
    return replace(sized(config(QWEN).model), held=Held(**held), parameters=held["weights"] / 4)


def config(path: str, method: str = "grpo", **settings):
    given = {"model__path": path, "data__train": "x.jsonl", **({"reward": "math"} if method == "grpo" else {})}
    return config_of(method, Path("runs/plan"), **given, **settings)


SIXTEEN = {"weights": 16e9, "trained": 16e9, "outside": 2e9}
"""Four billion weights in float32, half a billion of them outside the 28 layers."""


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Arrangement(), Divided(16e9, 16e9, 32e9)),
        # Gathered in 16 bits: what is outside the layers, two layers, and the gradients of one.
        (Arrangement("fsdp", 8), Divided(2e9, 2e9, 4e9, 1e9 + 3 * 7e9 / 28)),
        (Arrangement("fsdp", 8, reshard=False), Divided(2e9, 2e9, 4e9, 1e9 + 29 * 7e9 / 28)),
        (Arrangement("fsdp", 8, tensor=2), Divided(2e9, 2e9, 4e9, 0.5e9 + 3 * 3.5e9 / 28)),
        (Arrangement("fsdp", 8, context=4), Divided(2e9, 2e9, 4e9, 1e9 + 3 * 7e9 / 28)),
        (Arrangement("fsdp", 8, offload="optimizer"), Divided(2e9, 2e9, 0, 1e9 + 3 * 7e9 / 28)),
        (Arrangement("fsdp", 1), Divided(16e9, 16e9, 32e9, 0)),
        # 16 bits of all weights; master weights and two moments over eight; a bucket of half a billion gradients.
        (Arrangement("deepspeed", 8, zero_stage=1), Divided(8e9, 8e9, 6e9)),
        (Arrangement("deepspeed", 8, zero_stage=2), Divided(8e9, 1e9 + 1e9, 6e9)),
        (Arrangement("deepspeed", 8, zero_stage=3), Divided(1e9, 1e9 + 1e9, 6e9, 2e9)),
        (Arrangement("deepspeed", 8, zero_stage=3, offload="all"), Divided(0, 1e9 + 1e9, 0, 2e9)),
        # Gradients in float32; the embedding is on one of the stages, so half of what is outside the layers.
        (Arrangement("megatron", 8, tensor=2), Divided(4e9, 8e9, 6e9)),
        (Arrangement("megatron", 8, tensor=2, pipeline=4), Divided(0.875e9 + 0.25e9, 1.75e9 + 0.5e9, 6e9)),
    ],
)
def test_weights_gradients_and_optimizer_are_divided_as_the_backend_does(how: Arrangement, expected: Divided):
    found = divided(model(**SIXTEEN), how, half=True)
    for name in vars(expected):
        assert getattr(found, name) == pytest.approx(getattr(expected, name)), name


def test_experts_are_divided_over_expert_parallel_devices():
    mixed = model(**SIXTEEN, experts=12e9, trained_experts=12e9)
    megatron = Arrangement("megatron", 8, tensor=4, expert=8)
    # 2e9 bytes of layers over four, 12e9 of experts over eight, 2e9 outside over four; in 16 bits half of that.
    assert divided(mixed, megatron, half=True).weights == pytest.approx((0.5e9 + 1.5e9 + 0.5e9) / 2)
    assert divided(mixed, replace(megatron, expert=2, expert_tensor=4), half=True).weights == pytest.approx(1.25e9)
    gathered = [divided(mixed, Arrangement("fsdp", 8, expert=n), half=True).gathered for n in (1, 4)]
    assert gathered[0] - gathered[1] == pytest.approx(3 * 0.75 * 6e9 / 28)


def test_frozen_and_quantised_weights_have_no_gradients_and_are_not_cast():
    lora = model(weights=16e9, trained=0.16e9, outside=2e9)
    found = divided(lora, Arrangement("fsdp", 2), half=True)
    assert (found.weights, found.gradients, found.optimizer) == (8e9, 0.08e9, 0.16e9)
    packed = replace(lora, cfg=config(QWEN, model__adapter={"rank": 4}, model__quantization={"bits": 4}).model)
    assert divided(packed, Arrangement("deepspeed", 2, zero_stage=2), half=True).weights == 16e9


def test_any_number_of_tokens_and_parts_is_reckoned_from_two():
    found, how = sized(config(QWEN).model), Arrangement("fsdp", 8, checkpointing=True)
    few, many, more = (peaks_of(found, how, Micro(n, n), half=True, chunk_mb=128) for n in (2048, 4096, 6144))
    assert more.activations - many.activations == pytest.approx(many.activations - few.activations)
    # A layer's input of each token is kept: 28 x 1024 numbers of two bytes.
    assert (many.activations - few.activations) / 2048 == pytest.approx(28 * 1024 * 2, rel=0.2)
    plain = replace(how, checkpointing=False)
    one, two, four = (
        peaks_of(found, replace(plain, tensor=n), Micro(4096, 4096), half=True, chunk_mb=128).activations
        for n in (1, 2, 4)
    )
    assert one > two > four > one / 4
    assert two - four == pytest.approx((one - two) / 2)
    shared = peaks_of(found, replace(plain, context=2), Micro(8192, 8192), half=True, chunk_mb=128).activations
    assert shared == pytest.approx(one)


def test_tokens_and_pairs_of_a_step_are_those_of_its_trees():
    run = config(QWEN, rollout__group_size=3, rollout__prompts_per_step=5)
    load = load_of(run, Planned(run, None).method, Lengths(20, 7, 40, 9))
    shared = np.arange(20)
    tree = build([np.concatenate([shared, np.arange(7) + 100 * (i + 1)]) for i in range(3)])
    assert load.tokens == 5 * tree.num_tokens
    assert load.pairs == 5 * pairs(tree)
    assert load.looks == 5 * 3 * 7
    assert load.longest_unit == 40 + 3 * 9
    whole = run.model_copy(update={"model": run.model.model_copy(update={"attention": "rows"})})
    assert load_of(whole, load_method(run), load.lengths).tokens == 5 * 3 * 27


def load_method(run):
    return Planned(run, None).method


def test_a_group_is_cut_between_its_rows_and_a_pair_is_not():
    run = config(QWEN, rollout__group_size=8, rollout__max_tokens=4096, backend__max_tokens_per_device=4096)
    load = load_of(run, load_method(run))
    assert load.longest_unit == 512 + 8 * 4096
    assert load.micro(run).tokens == load.longest_row == 512 + 4096
    assert load.micro(run, context=4).tokens == 4 * 4096
    assert load.micro(run).again
    pairs_run = config(QWEN, "dpo", data__max_length=8192, backend__max_tokens_per_device=4096)
    pairs_load = load_of(pairs_run, load_method(pairs_run))
    assert pairs_load.micro(pairs_run).tokens == pairs_load.longest_unit > 8192
    short = config(QWEN, rollout__max_tokens=64, data__max_prompt_length=64)
    assert load_of(short, load_method(short)).micro(short, context=4).tokens == min(8192 * 4, 32 * (64 + 8 * 64))


def test_training_takes_the_operations_of_its_passes():
    run = config(QWEN, "sft", backend__activation_checkpointing=True)
    planned = Planned(run, read_machines("H100-80G"))
    counts, load = planned.models.policy.flops, planned.load
    forward = counts.per_token * load.tokens + counts.per_pair * load.pairs + counts.per_looked * load.looks
    speed = planned.configured.speed
    assert speed is not None
    assert speed.parts["training"] == pytest.approx(4 * forward / (989e12 * TRAINING))  # once more for recomputing
    assert speed.tokens_per_s == pytest.approx(load.tokens / speed.step_s)


def test_decoding_reads_weights_and_caches():
    run = config(QWEN, engine__use="vllm")
    planned, how = Planned(run, H100), Arrangement("fsdp", 4, engine="vllm", engines=4)
    policy, load = planned.models.policy, planned.load
    # Keys and values of 8 heads of 128 dimensions in 28 layers, two bytes each.
    assert token_bytes(policy) == 2 * 8 * 128 * 28 * 2
    one, many = (_decoding_step(run, policy, how, load, H100, 989e12, n) for n in (1, 64))
    length = load.lengths.prompt + load.lengths.response / 2
    assert one - STEP_S == pytest.approx((2 * policy.parameters + length * token_bytes(policy)) / (3.35e12 * READING))
    assert many - one == pytest.approx(63 * length * token_bytes(policy) / (3.35e12 * READING))


def test_of_many_experts_only_those_that_are_chosen_are_read():
    run = config("Qwen/Qwen3-30B-A3B", engine__use="vllm")
    policy, load = Planned(run, H100).models.policy, Planned(run, H100).load
    how = Arrangement("fsdp", 4, engine="vllm", engines=1)
    one, all_of_them = (_decoding_step(run, policy, how, load, H100, 989e12, n) for n in (1, 256))
    assert one < 0.15 * all_of_them
    assert one - STEP_S == pytest.approx(2 * 3.3e9 / (3.35e12 * READING), rel=0.1)  # 3.3B are active


def test_a_latent_cache_is_that_of_the_vector():
    assert token_bytes(sized(config("deepseek-ai/DeepSeek-V3").model)) == 2 * 61 * (512 + 64)


def test_heads_of_keys_that_are_fewer_than_devices_are_repeated():
    run = config("zai-org/GLM-Z1-9B-0414", engine__use="sglang")
    policy, how = sized(run.model), Arrangement("fsdp", 4, engine="sglang", engines=1)
    assert [cache_parts(run, policy, replace(how, engine_tensor=n)) for n in (1, 2, 8)] == [1, 2, 2]
    latent = config("deepseek-ai/DeepSeek-V3", engine__use="sglang")
    wide = replace(how, engine_tensor=64)
    assert cache_parts(latent, sized(latent.model), wide) == 1
    options = {"enable_dp_attention": True, "dp_size": 8}
    apart = config("deepseek-ai/DeepSeek-V3", engine__use="sglang", engine__options=options)
    assert cache_parts(apart, sized(apart.model), wide) == 8


def test_an_engine_holds_as_many_sequences_as_its_memory_allows():
    run = config("Qwen/Qwen3-32B", engine__use="vllm", engine__max_concurrent=2000, rollout__max_tokens=8192)
    planned = Planned(run, H100)
    how = Arrangement("fsdp", 4, engine="vllm", engines=1, engine_tensor=1)
    policy, load = planned.models.policy, planned.load
    parts = server_parts(run, policy, how, load, H100)
    assert sum(parts.values()) == pytest.approx(0.88 * H100.gpu.memory, rel=1e-6)
    few = concurrent(run, policy, how, load, H100)
    assert few == int(parts["engine's cache"] / ((256 / 8 + 4096) * token_bytes(policy)))
    assert concurrent(run, policy, replace(how, engine_tensor=4), load, H100) > few


def test_publishing_sends_the_weights_or_the_adapter_alone():
    how = Arrangement("fsdp", 4, engine="vllm", engines=2, engine_tensor=2)
    run = config(QWEN, engine__use="vllm")
    full = _publishing(run, sized(run.model), how, H100)
    assert full == pytest.approx(2 * 2 * sized(run.model).parameters / (450e9 * 0.7))
    lora = config(QWEN, engine__use="vllm", model__adapter={"rank": 8})
    assert _publishing(lora, sized(lora.model), how, H100) < full / 20
    over_nodes = _publishing(run, sized(run.model), replace(how, devices=16), H100)
    assert over_nodes == pytest.approx(full * 9)  # 50 GB/s between nodes


def test_a_critic_has_weights_gradients_and_time_of_its_own():
    run = config(QWEN, "grpo", backend__use="fsdp", cluster__num_processes=8, engine__use="vllm")
    ppo = config_of("ppo", Path("runs/plan"), **{**_given(run), "reward": "math"})
    plain, valued = (Planned(one, H100).configured for one in (run, ppo))
    assert "critic" not in plain.training.peak.parts and plain.speed and valued.speed
    policy = Planned(ppo, H100).models.policy
    # A sum of weights and two moments over eight, and what is gathered.
    assert valued.training.peak.parts["critic"] > 3 * policy.held.weights / 8
    assert valued.speed.parts["critic"] > 0


def _given(run) -> dict:
    return {
        **{"model__path": run.model.path, "data__train": "x.jsonl", "backend__use": "fsdp"},
        **{"cluster__num_processes": 8, "engine__use": "vllm"},
    }
