"""The estimate of memory: what is counted by hand, what it follows, and what a rehearsed step holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, Qwen3Config, Qwen3MoeConfig

from tests.runs import config_of, sums, write_rows
from whet.check.command import warnings_of_whet
from whet.check.examine import Examined, examine
from whet.check.memory import HEAP_HOLES, held_by
from whet.check.rehearsal import Live, Micro, Peaks, outline, rehearse
from whet.check.work import Units, work_of
from whet.config.model import AdapterConfig, ModelConfig
from whet.models.tiny import FAMILIES
from whet.schedule import plan

TINY = Qwen3Config(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)
PER_LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192 + 2 * 64 + 2 * 16
"""q and o, k and v, the three of the MLP, two norms, and the norms of queries and keys."""
WEIGHTS = 300 * 64 + 5 * PER_LAYER + 64
"""The embedding, which is the head as well, five layers, and the last norm."""


PLAIN = ModelConfig(path="x")
SOME = Micro(tokens=128, looks=64)


def peaks(micro: Micro = SOME, cfg: ModelConfig = PLAIN, config: Qwen3Config = TINY, **options) -> Peaks:
    given = {"autocast": None, "checkpointing": False, "chunk_mb": 128, **options}
    return rehearse(cfg, config, micro, **given)


def found(method: str, folder: Path, model: Path, **settings) -> Examined:
    rows = [{**row, "label": row["response"]} for row in sums(8)]
    data = write_rows(folder / "rows.jsonl", rows)
    given = {"model__path": str(model), "data__train": data, **settings}
    return examine(config_of(method, folder / "run", **given))


def test_weights_are_counted_once_however_they_are_tied():
    held = held_by(outline(PLAIN, TINY), PLAIN)
    assert held.weights == held.trained == 4 * WEIGHTS


def test_an_adapter_alone_is_trained():
    cfg = ModelConfig(path="x", adapter=AdapterConfig(rank=2))
    held = held_by(outline(cfg, TINY), cfg)
    # A and B of every linear layer: rank x (inputs + outputs).
    a_layer = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 192))
    assert held.trained == 4 * 5 * a_layer
    assert held.weights == 4 * WEIGHTS + held.trained


def test_quantised_layers_take_their_bits_and_the_embedding_stays_whole():
    cfg = ModelConfig.model_validate(
        {"path": "x", "quantization": {"bits": 4, "double": False}, "adapter": {"rank": 2}}
    )
    held = held_by(outline(cfg, TINY), cfg)
    linear = 5 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    assert held.weights - held.trained == pytest.approx(4 * (WEIGHTS - linear) + linear * 4.5 / 8)


def test_activations_of_a_layer_are_those_of_its_operations():
    """Per token: the two norms keep 3 x hidden each, queries and their norm 4, keys and values 4, the MLP 4."""
    queries, keys = 4 * 16, 2 * 16
    by_hand = 6 * 64 + 4 * queries + 4 * keys + 4 * 192
    per_layer = (peaks(Micro(128, 1)).activations - peaks(Micro(64, 1)).activations) / 64 / 4 / 5
    # Statistics of the norms, the log-sum-exp of each head, and the share of what lies outside the layers.
    assert by_hand <= per_layer <= 1.1 * by_hand


def test_two_depths_tell_every_depth():
    """Three layers are rehearsed as they are, four and five are reckoned from two and three."""
    three, four, five = (
        peaks(config=Qwen3Config(**{**TINY.to_dict(), "num_hidden_layers": depth, "layer_types": None})).activations
        for depth in (3, 4, 5)
    )
    assert five - four == pytest.approx(four - three) and four > three


def test_checkpointing_keeps_little_more_than_the_inputs_of_layers():
    kept = peaks(checkpointing=True).activations
    assert 5 * 128 * 64 * 4 <= kept < peaks().activations / 4


def test_bf16_takes_less_for_activations_and_frozen_weights_take_no_gradients():
    many = Micro(2048, 64)
    assert peaks(many, autocast=torch.bfloat16).activations < 0.95 * peaks(many).activations
    assert peaks(cfg=ModelConfig(path="x", adapter=AdapterConfig(rank=2))).rest < peaks().rest


def test_logits_are_held_up_to_a_chunk():
    few, many = (peaks(Micro(128, looks), chunk_mb=1).top for looks in (64, 100_000))
    chunk = 1 * 2**20
    assert few < many
    # 100,000 states and their gradients, but of logits no more than a chunk.
    assert many - few < 100_000 * 64 * 4 * 3 + 2 * chunk


def test_gradients_of_earlier_micro_batches_are_there_while_the_next_is_computed():
    once, again = peaks(), peaks(Micro(128, 64, again=True))
    assert again.top - once.top == pytest.approx(4 * WEIGHTS, rel=0.1)


def test_memory_is_counted_for_as_long_as_it_is_alive():
    with Live([]) as live:
        one = torch.empty(1000, device="meta")
        view = one[:10]
        two = torch.empty(500, device="meta")
        assert live.now == 6000
        del one, two
        assert live.now == 4000, "the view holds the whole"
        del view
    assert (live.now, live.mark(), live.mark()) == (0, 6000, 0)


def test_the_largest_micro_batch_is_that_of_the_run(tmp_path: Path):
    base = {"model__path": "x", "data__train": "x", "data__shuffle": False, "train__batch_size": 2}
    config = config_of("sft", tmp_path / "run", **base, backend__max_tokens_per_device=60)
    units = Units(np.array([10, 20, 50, 40, 70, 1]), np.array([5, 5, 9, 9, 30, 1]))
    work = work_of(units, plan(config, 6, rollouts=False), config)
    # Steps of 30, 90 and 71 tokens; the unit of 70 stands alone, above the limit.
    assert (work.step_tokens, work.micro.tokens, work.micro.looks, work.micro.again) == (90, 70, 30, True)
    assert (work.decoded, work.decoded_length) == (0, 0)


def test_a_reference_takes_the_weights_again_unless_an_adapter_or_a_file_stands_for_it(tmp_path: Path, tiny_qwen: Path):
    rows = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "no"} for row in sums(8)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)

    def frozen(**settings) -> float:
        given = {"model__path": str(tiny_qwen), "data__train": data, **settings}
        memory = examine(config_of("dpo", tmp_path / "run", **given)).memory
        assert memory is not None
        assert memory.peak.total > memory.peak.parts["process"]
        return memory.peak.parts["frozen models"] / memory.peak.parts["weights"]

    assert frozen() == 1
    assert frozen(model__adapter__rank=2) == frozen(reference__precompute=True) == 0
    assert frozen(reference__path=str(tiny_qwen)) == 1


def test_what_training_holds_is_counted_by_what_it_is(tmp_path: Path, tiny_qwen: Path):
    memory = found("sft", tmp_path, tiny_qwen).memory
    assert memory is not None
    forward, backward = (moment.parts for moment in memory.moments)
    assert forward["optimizer"] == 2 * forward["weights"] == 2 * backward["gradients"]
    assert forward["gradients"] == 0, "before the first micro-batch there are none"
    assert forward["heap"] == pytest.approx(HEAP_HOLES * forward["activations"], rel=0.01)


def test_sampling_holds_keys_and_values_of_all_it_decodes(tmp_path: Path, tiny_qwen: Path):
    settings = {"reward__use": "exact", "rollout__prompts_per_step": 4, "rollout__group_size": 8}
    memory = found("grpo", tmp_path, tiny_qwen, **settings, rollout__max_tokens=100).memory
    assert memory is not None
    sampling = next(moment for moment in memory.moments if moment.name == "sampling")
    # 32 rows of 256 positions, keys and values of two heads of 16 in float32; two layers, and one while it grows.
    assert sampling.parts["cache"] == 3 * 32 * 256 * 2 * 2 * 16 * 4
    assert sampling.parts["logits"] == 2 * 32 * 260 * 4


def test_sampling_in_pages_holds_whole_pages_of_what_it_decodes(tmp_path: Path, tiny_qwen: Path):
    settings = {"reward__use": "exact", "rollout__prompts_per_step": 3, "rollout__group_size": 3}
    memory = found("grpo", tmp_path, tiny_qwen, **settings, rollout__max_tokens=300, engine__cache="paged").memory
    assert memory is not None
    sampling = next(moment for moment in memory.moments if moment.name == "sampling")
    # 9 rows of two pages of 256 positions, not 16 rows, and one page that belongs to nobody.
    assert sampling.parts["cache"] == 3 * (9 * 2 + 1) * 256 * 2 * 2 * 16 * 4


def test_sampling_ahead_takes_the_weights_again_and_stays_while_a_step_trains(tmp_path: Path, tiny_qwen: Path):
    plain = found("grpo", tmp_path, tiny_qwen, reward__use="exact").memory
    ahead = found("grpo", tmp_path, tiny_qwen, reward__use="exact", rollout__mode="async").memory
    assert plain is not None and ahead is not None
    training, sampling = ahead.moments[0].parts, plain.moments[-1].parts
    assert training["engine's weights"] == training["weights"]
    held = [sampling[name] for name in ("cache", "logits", "kept prefixes", "packed weights")]
    assert training["sampling ahead"] == pytest.approx(sum(held))
    assert sampling["packed weights"] == sampling["weights"] and sampling["kept prefixes"] == 0
    assert "cache" not in ahead.moments[-1].parts and "engine's weights" not in plain.moments[0].parts


def test_what_is_too_large_is_told_with_its_largest_parts(tmp_path: Path, tiny_qwen: Path):
    with warnings_of_whet() as warnings:
        assert found("sft", tmp_path, tiny_qwen).memory.fits  # type: ignore[union-attr]
        assert not warnings
        assert not found("sft", tmp_path, tiny_qwen, backend__memory_gb=0.1).memory.fits  # type: ignore[union-attr]
    (said,) = warnings
    assert said.startswith("training needs about 0.4 GB (process 0.4") and "has 0.1 GB left" in said


def test_a_model_that_needs_content_is_not_estimated(tmp_path: Path, tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch):
    def routes(*args: object, **options: object) -> nn.Module:
        raise RuntimeError("the sizes depend on the content")

    monkeypatch.setattr("whet.check.memory.rehearse", routes)
    examined = found("sft", tmp_path, tiny_qwen)
    assert examined.memory is None and not examined.errors.errors


def test_a_critic_of_its_own_is_counted_with_its_optimizer_and_a_shared_one_is_not(tmp_path: Path, tiny_qwen: Path):
    given = {"reward": "math", "rollout__prompts_per_step": 4}
    memory = found("ppo", tmp_path, tiny_qwen, **given).memory
    assert memory is not None
    assert memory.peak.parts["critic"] == 3 * memory.peak.parts["weights"]
    names = [moment.name for moment in memory.moments]
    assert "critic: backward pass" in names
    shared = found("ppo", tmp_path, tiny_qwen, **given, critic__shared=True).memory
    assert shared is not None and "critic" not in shared.peak.parts


def test_the_folder_of_a_critic_is_looked_at_before_a_model_is_loaded(tmp_path: Path, tiny_qwen: Path):
    errors = found("ppo", tmp_path, tiny_qwen, reward="math", critic__path=str(tmp_path / "none")).errors.errors
    assert any("critic.path is" in str(error) for error in errors)


def test_of_experts_as_many_activations_are_held_as_a_token_goes_through():
    sizes = {**TINY.to_dict(), "num_experts": 8, "moe_intermediate_size": 48, "layer_types": None}
    one, two = (
        peaks(config=Qwen3MoeConfig(**sizes, num_experts_per_tok=chosen), micro=Micro(256, 1)).activations
        for chosen in (1, 2)
    )
    # A token that goes through one more expert keeps its state, gate and up (twice: they are cut apart), their
    # product, what comes out, and that weighted.
    another = 64 + 96 + 3 * 48 + 2 * 64
    assert (two - one) / 256 / 4 / 5 == pytest.approx(another, rel=0.3)


def test_layers_unlike_the_others_are_counted_as_they_are():
    """DeepSeek's first layers have no experts: gradients of a depth that is reckoned are those of that depth."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    settings = {**FAMILIES["deepseek_v3"].settings, "first_k_dense_replace": 3}
    shape = DeepseekV3Config(**sizes, **settings, num_hidden_layers=6)
    held = held_by(outline(PLAIN, shape), PLAIN)
    found = peaks(Micro(4, 1), config=shape)
    assert held.trained < found.rest < 1.5 * held.trained
