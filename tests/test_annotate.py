"""Annotations: what frozen models and earlier steps say of a batch, worked by hand."""

from __future__ import annotations

import pytest
import torch

from whet.annotate import Annotate, AotPartners, KLBaseline, RewardMean, mismatched
from whet.batch import Batch, collate
from whet.types import Sample, Unit


def row(name: str, prompt: list[int], answer: list[int], label: float = 1.0) -> Unit:
    mask = [False] * len(prompt) + [True] * len(answer)
    return Unit(name, (Sample(prompt + answer, mask, columns={"labels": label}),))


class Says:
    """A model whose logprob of each trained token is the token's number times a factor."""

    shares_prefixes = True

    def __init__(self, factor: float):
        self.factor, self.seen = factor, []

    def forward(self, batch: Batch, outputs) -> dict[str, torch.Tensor]:
        self.seen.append(batch)
        return {name: torch.where(batch.loss_mask, batch.tokens * self.factor, 0.0) for name in outputs}


def test_mismatched_rows_are_prompts_with_the_completion_of_another_row():
    batch = collate([row("a", [1, 2], [3]), row("b", [4], [5, 6]), row("c", [7, 8, 9], [10, 11, 12])])
    samples = mismatched(batch)
    assert [list(one.tokens) for one in samples] == [[1, 2, 10, 11, 12], [4, 3], [7, 8, 9, 5, 6]]
    assert [list(one.loss_mask) for one in samples] == [[0, 0, 1, 1, 1], [0, 1], [0, 0, 0, 1, 1]]


def test_no_completion_stays_with_its_prompt_in_batches_of_any_size():
    for size in (2, 3, 5, 8):
        batch = collate([row(str(i), [100 + i], [i]) for i in range(size)])
        rows = [tuple(one.tokens) for one in mismatched(batch)]
        assert sorted(answer for _, answer in rows) == list(range(size))
        assert all(answer != prompt - 100 for prompt, answer in rows)


def test_the_baseline_is_the_mean_log_ratio_of_mismatched_rows_over_the_whole_batch():
    batch = collate([row("a", [1], [2, 3]), row("b", [4], [5]), row("c", [6], [7], 0.0)])
    # Completions sum to 5, 5 and 7; the policy says 0.2 of that, the reference 0.1: mean 0.1 * 17 / 3.
    batch = KLBaseline()(batch, {"policy": Says(0.2), "reference": Says(0.1)}, {})
    assert batch["kl_baseline"].tolist() == pytest.approx([1.7 / 3] * 3)


@pytest.mark.parametrize("shares", [True, False])
def test_the_reference_reads_each_prompt_once_for_both_of_its_completions(shares):
    prompts = [list(range(10, 30)), list(range(30, 60))]
    batch = collate([row("a", prompts[0], [1, 2]), row("b", prompts[1], [3])])
    policy, reference = Says(0.2), Says(0.1)
    reference.shares_prefixes = shares
    said = KLBaseline()(batch, {"policy": policy, "reference": reference}, {})
    assert said["ref_logprobs"].tolist() == (torch.where(batch.loss_mask, batch.tokens * 0.1, 0)).tolist()
    assert said["kl_baseline"].tolist() == pytest.approx([0.1 * 6 / 2] * 2)
    (both,) = reference.seen
    assert both.num_tokens == 2 * (20 + 30) + 2 * (2 + 1)
    assert both.tree.num_tokens == (20 + 30 + 2 * (2 + 1) if shares else both.num_tokens)


def test_a_reference_that_was_run_before_reads_the_other_completions_alone():
    batch = collate([row("a", [1], [2, 3]), row("b", [4], [5])]).with_columns(ref_logprobs=torch.full((5,), 7.0))
    reference = Says(0.1)
    said = KLBaseline()(batch, {"policy": Says(0.2), "reference": reference}, {})
    assert said["kl_baseline"].tolist() == pytest.approx([0.5] * 2)
    assert said["ref_logprobs"].tolist() == [7.0] * 5
    assert [one.num_tokens for one in reference.seen] == [5]


def test_the_baseline_is_never_below_zero():
    batch = collate([row("a", [1], [2]), row("b", [4], [5])])
    assert KLBaseline()(batch, {"policy": Says(0.1), "reference": Says(0.2)}, {})["kl_baseline"].tolist() == [0, 0]


def test_the_baseline_of_a_single_row_is_zero_and_runs_no_model():
    batch = KLBaseline()(collate([row("a", [1], [2])]), {}, {})
    assert batch["kl_baseline"].tolist() == [0]


def test_the_reward_mean_counts_rows_of_earlier_steps():
    stage, running = RewardMean(), {}
    one = collate([row("a", [1], [2]), row("b", [1], [3], 0.0)])
    assert stage(one, {}, running)["reward_mean"].tolist() == [0, 0]
    stage.observe(one, {"rewards/chosen": 0.4, "rewards/rejected": -0.2}, running)  # two rows, mean 0.1
    three = collate([row("a", [1], [2]), row("b", [1], [3], 0.0), row("c", [1], [4], 0.0), row("d", [1], [4], 0.0)])
    stage.observe(three, {"rewards/chosen": 0.8, "rewards/rejected": 0.0}, running)  # four rows, mean 0.2
    assert running["reward_mean"] == [6, pytest.approx((2 * 0.1 + 4 * 0.2) / 6)]
    assert stage(one, {}, running)["reward_mean"].tolist() == pytest.approx([1 / 6] * 2)


def test_a_column_that_the_rows_bring_along_is_not_computed_again():
    unit = Unit("a", (Sample([1, 2, 3], [False, True, True], columns={"ref_logprobs": [0.0, -1.0, -2.0]}),))
    stage = Annotate("reference", "logprobs", "ref_logprobs")
    assert stage(collate([unit]), {}, {})["ref_logprobs"].tolist() == [0, -1, -2]


def test_an_annotation_writes_what_its_model_says():
    stage = Annotate("reference", "logprobs", "ref_logprobs")
    batch = stage(collate([row("a", [1], [2, 3])]), {"reference": Says(-0.5)}, {})
    assert batch["ref_logprobs"].tolist() == [0, -1.0, -1.5]
    assert (stage.roles, stage.writes) == ({"reference"}, {"ref_logprobs"})


def test_sorted_sides_meet_across_the_batch():
    def pair(name: str, chosen: int, rejected: int) -> Unit:
        samples = [
            Sample([1, answer], [False, True], columns={"labels": label})
            for answer, label in ((chosen, 1.0), (rejected, 0.0))
        ]
        return Unit(name, tuple(samples))

    batch = collate([pair("a", 9, 2), pair("b", 4, 3)])
    batch = batch.with_columns(ref_logprobs=torch.zeros(batch.num_tokens))
    batch = AotPartners()(batch, {"policy": Says(1.0)}, {})
    # Chosen 9 > 4 and rejected 2 < 3: the larger chosen meets the larger rejected, which is the other pair's.
    assert batch["aot_rejected"].tolist() == [3, 2]
    assert batch["aot_chosen"].tolist() == [4, 9]
