"""Policy losses against TRL's own, value and gradient, on ragged groups: a second opinion on every formula.

Needs the extra `peers`; skipped, saying so, where TRL is not installed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from whet.batch import Batch, WeightKind, collate
from whet.losses import LOSSES
from whet.losses.base import Loss
from whet.losses.correction import Corrected, Correction
from whet.types import Sample, Unit

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="TRL is not installed; get it with the extra `peers`: pip install whet[peers]")

from trl import GRPOTrainer

RTOL, ATOL = 1e-5, 1e-7
LONGEST = 12
RAGGED = {"ragged": [3, 5, 1, 1, 6, 2, 4, 9], "one row": [4], "long rows": [12, 12, 11]}
HOLED = [3, 0, 0, 2, 5, 5]
"""Rows without trained tokens: TRL counts them in means over sequences, we do not, so only token means compare."""


class Rows:
    """Random rows of these numbers of trained tokens, with old, reference and sampler logprobs, and advantages."""

    def __init__(self, lengths: list[int], *, spread: float = 0.3, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        prompts = torch.randint(1, 4, (len(lengths),), generator=draw).tolist()
        samples = [Sample([1] * (p + n), [False] * p + [True] * n) for p, n in zip(prompts, lengths, strict=True)]
        self.batch: Batch = collate([Unit(str(i), (sample,)) for i, sample in enumerate(samples)])
        old = -torch.rand(self.batch.num_tokens, generator=draw) * 3
        near = {name: old + spread * torch.randn(old.shape, generator=draw) for name in ("new", "ref", "sampler")}
        self.per_row = torch.randn(len(lengths), generator=draw)
        self.batch = self.batch.with_columns(
            old_logprobs=old,
            ref_logprobs=near["ref"],
            sampler_logprobs=near["sampler"],
            advantages=self.per_row[self.batch.sequence_ids] * self.batch.loss_mask,
        )
        self.leaf = near["new"].clone().requires_grad_()
        self.theirs = near["new"].clone().requires_grad_()
        self.width = max(1, max(lengths))

    def padded(self, values: Tensor) -> Tensor:
        """[T] -> [N, width]: the trained tokens of each row, 0 behind them."""
        rows = values.split(self.batch.lengths.tolist())
        masks = self.batch.loss_mask.split(self.batch.lengths.tolist())
        kept = [row[mask] for row, mask in zip(rows, masks, strict=True)]
        return torch.stack([nn.functional.pad(row, (0, self.width - len(row))) for row in kept])

    def ours(self, loss: Loss, weight: WeightKind, **options: Any) -> Tensor:
        out = {"logprobs": self.leaf, "entropy": torch.zeros_like(self.leaf)}
        values, _ = loss(out, self.batch, **options)
        weighed = self.batch.weighed([weight], max_length=LONGEST)
        return (values * weighed[f"weights/{weight}"]).sum()

    def trl(self, loss_type: str, *, level: str = "token", low: float = 0.2, high: float = 0.28, **more: Any) -> Tensor:
        """TRL's loss of the same rows."""

        def identity(x: Tensor, **options: Any) -> Tensor:
            return x

        mask = self.padded(self.batch.loss_mask.float()).long()
        logprobs = self.padded(self.theirs)
        settings = {"delta": more.get("delta"), "use_bias_correction_kl": more.get("unbiased", False)}
        settings |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "steps_per_generation": 1}
        self_ = SimpleNamespace(
            args=SimpleNamespace(**settings),
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(gather=identity, reduce=identity, num_processes=1, sync_gradients=True),
            _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
            get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
            off_policy_mask_threshold=more.get("opsm"),
            importance_sampling_level=level,
            loss_type=loss_type,
            epsilon_low=low,
            epsilon_high=high,
            beta=more.get("beta", 0.0),
            use_vllm="importance_sampling_ratio" in more,
            vllm_importance_sampling_correction=True,
            current_gradient_accumulation_steps=1,
            max_completion_length=LONGEST,
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            _entropy_bonus_enabled=False,
            _metrics={"train": defaultdict(list)},
        )
        ids = torch.zeros_like(mask)
        inputs = {
            **{"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask},
            **{"advantages": self.per_row, "old_per_token_logps": self.padded(self.batch["old_logprobs"])},
            **{"ref_per_token_logps": self.padded(self.batch["ref_logprobs"]), "num_items_in_batch": mask.sum()},
        }
        if "importance_sampling_ratio" in more:
            inputs["importance_sampling_ratio"] = more["importance_sampling_ratio"]
        return GRPOTrainer._compute_loss(self_, None, inputs)

    def same(self, ours: Tensor, theirs: Tensor) -> None:
        """Equal values, and equal gradients at the logprobs of every token."""
        assert torch.allclose(ours, theirs, rtol=RTOL, atol=ATOL), (ours, theirs)
        (own,) = torch.autograd.grad(ours, self.leaf)
        (right,) = torch.autograd.grad(theirs, self.theirs)
        assert torch.allclose(own, right, rtol=1e-4, atol=ATOL), (own, right)


LIMITS = {"clip_low": 0.2, "clip_high": 0.28}
NARROW = {"clip_low": 0.03, "clip_high": 0.04}
CASES = {
    "grpo": ("ppo_clip", "sequence", LIMITS, {"loss_type": "grpo"}),
    "dapo": ("ppo_clip", "token", LIMITS, {"loss_type": "dapo"}),
    "bnpo": ("ppo_clip", "token", LIMITS, {"loss_type": "bnpo"}),
    "dr_grpo": ("ppo_clip", "fixed_length", LIMITS, {"loss_type": "dr_grpo"}),
    "two-sided": ("ppo_clip", "sequence", LIMITS | {"dual_clip": 1.5}, {"loss_type": "grpo", "delta": 1.5}),
    "gspo": ("gspo", "sequence", NARROW, {"loss_type": "grpo", "level": "sequence", "low": 0.03, "high": 0.04}),
    "cispo": ("cispo", "token", {"clip_high": 0.2}, {"loss_type": "cispo", "high": 1.2}),
    "sapo": ("sapo", "sequence", {}, {"loss_type": "sapo"}),
}


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("name", CASES)
def test_policy_losses_are_those_of_trl(name: str, spread: float, lengths: list[int]):
    loss, weight, options, theirs = CASES[name]
    rows = Rows(lengths, spread=spread)
    rows.same(rows.ours(LOSSES[loss], weight, **options), rows.trl(**theirs))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1] != "sequence"])
def test_rows_without_trained_tokens_are_those_of_trl(name: str):
    loss, weight, options, theirs = CASES[name]
    rows = Rows(HOLED)
    rows.same(rows.ours(LOSSES[loss], weight, **options), rows.trl(**theirs))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_the_penalty_towards_the_reference_is_that_of_trl(name: str, unbiased: bool):
    _, weight, options, theirs = CASES[name]
    rows = Rows(RAGGED["ragged"])
    penalty = rows.ours(LOSSES["kl"], weight, unbiased=unbiased)
    ours = rows.ours(LOSSES["ppo_clip"], weight, **options) + 0.3 * penalty
    rows.same(ours, rows.trl(**theirs, beta=0.3, unbiased=unbiased))


@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_sequences_that_the_policy_has_left_are_those_of_trl(threshold: float):
    rows = Rows([3, 5, 1, 1, 6, 2, 4, 9])
    corrected = Corrected(LOSSES["ppo_clip"], Correction(None, "token", 0.0, 1.0, opsm=threshold))
    rows.same(rows.ours(corrected, "token", **LIMITS), rows.trl("dapo", opsm=threshold))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_corrections_of_the_sampler_are_those_of_trl(mode: str):
    rows = Rows([3, 5, 1, 1, 6, 2, 4, 9])
    level, kind = mode.split("_")
    mask = rows.padded(rows.batch.loss_mask.float())
    difference = rows.padded(rows.batch["old_logprobs"] - rows.batch["sampler_logprobs"]) * mask
    # As in GRPOTrainer._generate_and_score_completions.
    difference = difference.sum(-1, keepdim=True) if level == "sequence" else difference
    ratio = difference.exp()
    low, high = 0.7, 1.4
    ratio = ratio.clamp(low, high) if kind == "truncate" else ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
    corrected = Corrected(LOSSES["ppo_clip"], Correction("tis" if kind == "truncate" else "mis", level, low, high))
    theirs = rows.trl("dapo", importance_sampling_ratio=ratio)
    rows.same(rows.ours(corrected, "token", **LIMITS), theirs)
