"""Families with experts, latent attention or norms of their own: trained, sampled and exported like the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from runs import column, config_of, sums, train, write_rows
from whet.models.tiny import make_tiny
from whet.types import Episode

FAMILIES = ("glm4", "qwen3_moe", "deepseek_v3")


def share_of_a(episode: Episode) -> float:
    return episode.response.count("a") / episode.num_sampled


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("families") / request.param, family=request.param)


def test_rows_are_learned_and_the_export_is_what_was_trained(folder: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", sums(16))
    given = {"model__path": str(folder), "data__train": rows, "train__steps": 8, "train__batch_size": 8}
    run = train(config_of("sft", tmp_path / "out", **given, optim__lr=1e-2))
    losses = column(tmp_path / "out", "loss")
    assert losses[-1] < 0.7 * losses[0]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        trained = run.policy.backend.model.eval()
        assert torch.equal(exported(tokens).logits, trained(tokens, use_cache=False).logits)


@pytest.mark.parametrize("lora", [False, True])
def test_the_embedded_engine_samples_what_the_trainer_computes(folder: Path, tmp_path: Path, lora: bool):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in sums(8)])
    given = {
        **{"model__path": str(folder), "data__train": prompts, "reward": "test_run_families:share_of_a"},
        **{"rollout__prompts_per_step": 4, "rollout__group_size": 4, "rollout__max_tokens": 6},
        **{"train__steps": 3, "optim__lr": 1e-2},
        **({"model__adapter": {"rank": 4}} if lora else {}),
    }
    train(config_of("grpo", tmp_path / "out", **given))
    assert max(column(tmp_path / "out", "train/train_rollout_logprob_abs_diff_max")) < 1e-4
