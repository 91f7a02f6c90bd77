"""Prepared pairs and judged completions: units with their columns, counts, splits by question, attached columns."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from whet.batch import collate
from whet.config.data import DataConfig
from whet.data.prepare import prepare
from whet.data.prepared import LabelCounts, Prepared
from whet.data.shapes import Task
from whet.errors import ConfigError, DataError
from whet.types import Sample, Unit

Settings = Callable[..., DataConfig]
Write = Callable[..., str]

PAIRS = [
    {"prompt": "ab", "chosen": "c", "rejected": "de", "margin": 1},
    {"prompt": "f", "chosen": "ghi", "rejected": "j", "margin": 0.25},
]
JUDGED = [{"prompt": "ab", "completion": "c", "label": True}, {"prompt": "f", "completion": "gh", "label": False}]


@pytest.fixture
def read(settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Prepared]:
    """Prepares rows for a task."""

    def read(task: Task, *rows: dict, name: str = "train.jsonl", **values: object) -> Prepared:
        return prepare(settings(**values), write_rows(*rows, name=name), tokenizer, task=task)

    return read


@pytest.mark.parametrize("task", ["preference", "reward"])
def test_a_pair_is_a_unit_of_the_chosen_and_the_rejected(
    read: Callable[..., Prepared], tokenizer: PreTrainedTokenizerFast, task: Task
):
    prepared, eos = read(task, *PAIRS), tokenizer.eos_token_id
    assert prepared[0] == Unit(
        "train/0",
        (
            Sample((*b"abc", eos), (False, False, True, True), columns={"labels": 1.0}),
            Sample((*b"abde", eos), (False, False, True, True, True), columns={"labels": 0.0}),
        ),
        {"margins": 1.0},
    )
    assert prepared[1].columns == {"margins": 0.25}
    assert prepared.lengths.tolist() == [9, 8]
    assert (prepared.prompt(0), prepared.prompt(1)) == (tuple(b"ab"), tuple(b"f"))
    assert prepared.label_counts == LabelCounts(2, 2)
    assert str(prepared.report) == (
        "2 rows, 17 tokens, 11 of them trained; longest 5; truncated 0 (0.0%), dropped 0 (0.0%)"
    )


def test_labels_and_margins_reach_the_batch_and_the_prompt_stands_once(read: Callable[..., Prepared]):
    batch = collate(list(read("preference", *PAIRS)))
    assert batch["labels"].tolist() == [1, 0, 1, 0]
    assert batch["margins"].tolist() == [1, 0.25]
    # The prompt of 20 tokens stands once: 20 + 2 + 3.
    (tree,) = collate(list(read("preference", {**PAIRS[0], "prompt": "p" * 20}))).trees
    assert tree.num_tokens == 25
    assert set(collate(list(read("preference", *({**row, "margin": None} for row in PAIRS)))).columns) == {"labels"}


def test_a_judged_completion_is_a_unit_of_one_sample(read: Callable[..., Prepared]):
    prepared = read("unpaired", *JUDGED)
    assert [[sample.columns for sample in unit.samples] for unit in prepared] == [[{"labels": 1.0}], [{"labels": 0.0}]]
    assert [unit.columns for unit in prepared] == [{}, {}]
    assert prepared.label_counts == prepared.report.labels == LabelCounts(1, 1)
    assert str(prepared.report).endswith("dropped 0 (0.0%); 1 desirable, 1 undesirable")


def test_pairs_are_judged_completions_two_by_two(read: Callable[..., Prepared], tokenizer: PreTrainedTokenizerFast):
    prepared = read("unpaired", *PAIRS)
    assert [unit.id for unit in prepared] == [f"train/{i}" for i in range(4)]
    assert [tokenizer.decode(unit.samples[0].tokens[:-1]) for unit in prepared] == ["abc", "abde", "fghi", "fj"]
    assert [unit.samples[0].columns["labels"] for unit in prepared] == [1, 0, 1, 0]
    assert [prepared.origin(i).rpartition(":")[2] for i in range(4)] == ["1", "1", "2", "2"]
    assert (prepared.report.rows, prepared.label_counts) == (4, LabelCounts(2, 2))
    assert all(unit.columns == {} for unit in prepared)


def test_counts_are_of_the_units_selected(read: Callable[..., Prepared]):
    rows = [{"prompt": f"{i}", "completion": "c", "label": i % 3 == 0} for i in range(60)]
    prepared = read("unpaired", *rows)
    assert prepared.label_counts == (20, 40)
    train, held = prepared.hold_out(0.3, seed=0)
    for part in (train, held):
        desirable = sum(unit.samples[0].columns["labels"] for unit in part)
        assert part.label_counts == part.report.labels == (desirable, len(part) - desirable)
    assert train.label_counts != (20, 40)
    assert read("sft", {"text": "a"}, name="text.jsonl").label_counts is None


def test_pairs_of_twice_the_same_are_left_out_and_told(read: Callable[..., Prepared], caplog: pytest.LogCaptureFixture):
    same = {"prompt": "q", "chosen": "a", "rejected": "a", "margin": 1}
    with caplog.at_level(logging.WARNING):
        prepared = read("preference", PAIRS[0], same, PAIRS[1], same)
    assert [unit.id for unit in prepared] == ["train/0", "train/2"]
    report = prepared.report
    assert (report.rows, report.identical, report.dropped) == (4, 2, 0)
    assert str(report).endswith("; 2 pairs of twice the same left out")
    assert "2 of 4 rows are left out: their chosen and rejected completions are the same tokens" in caplog.text
    assert "train.jsonl:2)" in caplog.text
    caplog.clear()
    # Told again when it is read from the cache, of the file as it is called now.
    read("preference", PAIRS[0], same, PAIRS[1], same, name="other.jsonl")
    assert "other.jsonl:2)" in caplog.text
    with pytest.raises(DataError, match="none of 1 pairs is left"):
        read("preference", same)
    assert len(read("unpaired", same, PAIRS[0])) == 2
    whole = {"chosen": "q a", "rejected": "q a"}
    assert read("preference", {"chosen": "q a", "rejected": "q b"}, whole).report.identical == 1


def test_uneven_margins_and_other_faults_are_told_together(read: Callable[..., Prepared]):
    bare = {name: value for name, value in PAIRS[1].items() if name != "margin"}
    with pytest.raises(DataError) as caught:
        read("preference", PAIRS[0], bare, {**PAIRS[1], "chosen": 3}, {**PAIRS[1], "margin": "x"})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("3 rows cannot be used (") and "1 uneven margins" in lines[0]
    assert [line.partition(": ")[0].rpartition(":")[2] for line in lines[1:]] == ["2", "3", "4"]


def test_what_is_judged_are_completions(read: Callable[..., Prepared]):
    for task in ("preference", "reward", "unpaired"):
        with pytest.raises(ConfigError, match=r"data\.train_on is 'all', but what is judged are completions"):
            read(task, *PAIRS, train_on="all")


def test_a_task_has_its_own_entry_in_the_cache_and_its_own_fingerprint(read: Callable[..., Prepared], tmp_path: Path):
    found = [read(task, *PAIRS).fingerprint for task in ("preference", "unpaired")]
    assert len({path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()}) == 2
    assert len(set(found)) == 2


def test_labels_and_margins_are_part_of_the_fingerprint(read: Callable[..., Prepared]):
    def of(task: Task, *rows: dict) -> str:
        return read(task, *rows).fingerprint

    assert of("preference", *PAIRS) == of("preference", *PAIRS)
    assert of("preference", *PAIRS) != of("preference", PAIRS[0], {**PAIRS[1], "margin": 0.5})
    bare = [{**row, "margin": None} for row in PAIRS]
    assert of("preference", *PAIRS) != of("preference", *bare)
    assert of("unpaired", *JUDGED) != of("unpaired", JUDGED[0], {**JUDGED[1], "label": True})


@pytest.mark.parametrize("task", ["preference", "reward", "unpaired"])
def test_a_question_is_never_on_both_sides_of_a_split(read: Callable[..., Prepared], task: Task):
    rows = [{"prompt": f"{i % 40}", "chosen": f"c{i}", "rejected": "r"} for i in range(200)]
    prepared = read(task, *rows)
    train, held = prepared.hold_out(0.3, seed=0)
    sides = [{part.prompt(i) for i in range(len(part))} for part in (train, held)]
    assert sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == 40
    assert len(train) + len(held) == len(prepared)
    assert len(held) % 5 == 0  # each question with all its answers


def test_the_same_question_falls_on_the_same_side_for_every_task(read: Callable[..., Prepared]):
    rows = [{"prompt": f"{i}", "chosen": f"c{i}", "rejected": "r"} for i in range(60)]
    held = [read(task, *rows).hold_out(0.3, seed=0)[1] for task in ("preference", "reward", "unpaired")]
    questions = [{part.prompt(i) for i in range(len(part))} for part in held]
    assert questions[0] == questions[1] == questions[2]


def test_pairs_without_a_prompt_are_split_by_their_text(read: Callable[..., Prepared]):
    rows = [{"prompt": "", "chosen": f"{i}", "rejected": "r"} for i in range(100)]
    train, held = read("preference", *rows).hold_out(0.3, seed=0)
    assert 10 < len(held) < 50 and len(train) + len(held) == 100


def test_columns_are_attached_to_the_tokens_of_every_sample(read: Callable[..., Prepared], tmp_path: Path):
    prepared = read("preference", *PAIRS)
    size = len(prepared.arrays.tokens)
    logprobs = np.memmap(tmp_path / "ref", dtype=np.float32, mode="w+", shape=(size,))
    logprobs[:] = -np.arange(size)
    likely = np.arange(2 * size).reshape(size, 2)
    richer = prepared.with_columns(ref_logprobs=logprobs).with_columns(teacher_topk_ids=likely)
    assert prepared[0].samples[0].columns == {"labels": 1.0}
    assert set(richer[0].samples[0].columns) == {"labels", "ref_logprobs", "teacher_topk_ids"}
    # The unit in second place has 5 + 3 tokens after the first unit's 9.
    assert richer.spans(1) == (slice(9, 14), slice(14, 17))
    assert richer[1].samples[1].columns["ref_logprobs"].tolist() == [-14, -15, -16]
    assert richer[1].samples[1].columns["teacher_topk_ids"].tolist() == [[28, 29], [30, 31], [32, 33]]
    batch = collate([richer[1], richer[0]])
    assert torch.equal(batch["ref_logprobs"], -torch.tensor([*range(9, 17), *range(9)]).float())
    assert batch["teacher_topk_ids"].shape == (17, 2)
    assert richer.fingerprint == prepared.fingerprint


def test_attached_columns_stay_with_their_rows_in_a_split(read: Callable[..., Prepared]):
    rows = [{"prompt": f"{i}", "response": f"{i * i}"} for i in range(50)]
    prepared = read("sft", *rows)
    marked = prepared.with_columns(ref_logprobs=prepared.arrays.tokens.astype(np.float32))
    for part in marked.hold_out(0.3, seed=0):
        for unit in part:
            (sample,) = unit.samples
            assert sample.columns["ref_logprobs"].tolist() == list(sample.tokens)


def test_columns_that_do_not_fit_are_a_fault_of_ours(read: Callable[..., Prepared]):
    prepared = read("preference", *PAIRS)
    with pytest.raises(AssertionError, match="has 3 entries for 17 tokens"):
        prepared.with_columns(ref_logprobs=np.zeros(3))
    with pytest.raises(AssertionError, match="'margins' is not per token"):
        prepared.with_columns(margins=np.zeros(17))


def test_a_truncated_pair_trains_both_sides(read: Callable[..., Prepared], tokenizer: PreTrainedTokenizerFast):
    rows = [{"prompt": "pp", "chosen": "ccccc", "rejected": "r"}, {"prompt": "p" * 9, "chosen": "c", "rejected": "r"}]
    prepared = read("preference", *rows, max_length=5, max_cut_share=1)
    report = prepared.report
    assert (report.rows, report.truncated, report.dropped, report.untrained, report.longest) == (2, 1, 1, 1, 11)
    assert [tokenizer.decode(sample.tokens) for sample in prepared[0].samples] == ["ppccc", "ppr<|im_end|>"]
    scored = read("reward", *rows, max_length=5, max_cut_share=1)
    assert [tokenizer.decode(sample.tokens) for sample in scored[0].samples] == ["ppcc<|im_end|>", "ppr<|im_end|>"]
    with pytest.raises(DataError, match=r"2 of 2 rows \(100\.0%\) are longer than data\.max_length"):
        read("preference", *rows, max_length=5)


def test_real_pairs_of_conversations_are_prepared(
    shared_data: Path, settings: Settings, tokenizer: PreTrainedTokenizerFast
):
    rows = json.loads((shared_data / "dpo_en_demo.json").read_text(encoding="utf-8"))[:150]
    for task in ("preference", "reward"):
        path = str(shared_data / "dpo_en_demo.json@[:150]")
        prepared = prepare(settings(max_length=100_000), path, tokenizer, task=task)
        report = prepared.report
        assert (report.rows, report.truncated, report.dropped, report.identical) == (150, 0, 0, 0)
        assert prepared.label_counts == (150, 150)
        answers = sum(len(row[side]["value"].encode()) + 1 for row in rows for side in ("chosen", "rejected"))
        assert report.trained_tokens == answers
        for i in range(0, 150, 17):
            chosen, rejected = prepared[i].samples
            prompt = prepared.prompt(i)
            question = tokenizer.decode(prompt)
            assert question.endswith(rows[i]["conversations"][-1]["value"] + "<|im_end|>\n<|im_start|>assistant\n")
            assert chosen.tokens[: len(prompt)] == rejected.tokens[: len(prompt)] == prompt
            assert tokenizer.decode(chosen.tokens[len(prompt) :]) == rows[i]["chosen"]["value"] + "<|im_end|>"
            assert rejected.tokens[-1] == tokenizer.eos_token_id


def test_real_labels_are_prepared(shared_data: Path, settings: Settings, tokenizer: PreTrainedTokenizerFast):
    rows = json.loads((shared_data / "kto_en_demo.json").read_text(encoding="utf-8"))
    prepared = prepare(settings(max_length=100_000), str(shared_data / "kto_en_demo.json"), tokenizer, task="unpaired")
    assert str(prepared.report).startswith("300 rows, ")
    assert str(prepared.report).endswith("truncated 0 (0.0%), dropped 0 (0.0%); 150 desirable, 150 undesirable")
    for i in range(0, 300, 31):
        (sample,) = prepared[i].samples
        trained = tokenizer.decode([token for token, on in zip(sample.tokens, sample.loss_mask, strict=True) if on])
        assert trained == rows[i]["messages"][-1]["content"] + "<|im_end|>"
        assert sample.columns["labels"] == float(rows[i]["label"])
