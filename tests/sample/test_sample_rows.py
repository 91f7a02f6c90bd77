"""Rows are training data as the data room reads it, and keep where they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from whet.config.data import DataConfig
from whet.config.sample import SampleConfig
from whet.data.prepare import prepare
from whet.sample.journal import Completed
from whet.sample.rows import rows_of
from whet.sample.select import select
from whet.types import Prompt

GROUP = [Completed(0, "4", 1.0, "completed", 2), Completed(1, "5", 0.0, "completed", 2)]
PLAIN = Prompt("train/0", (1, 2), "2+2=", label="4", metadata={"origin": "sums"})
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
CHAT = Prompt("train/1", (1, 2), MESSAGES)
WORDS = {"best": ("response",), "all": ("response",), "pairs": ("chosen", "rejected"), "labels": ("completion",)}


def rows(prompt: Prompt, **settings) -> list[dict]:
    config = SampleConfig(**settings)
    return list(rows_of(prompt, "g7", select(GROUP, config), config))


def test_a_row_says_where_it_comes_from():
    known = {"group": "g7", "metadata": {"origin": "sums", "label": "4"}}
    assert rows(PLAIN) == [{"prompt": "2+2=", "response": "4", "index": 0, "score": 1.0, **known}]
    pair = {"prompt": "2+2=", "chosen": "4", "rejected": "5", "margin": 1.0, "index": [0, 1], "score": [1.0, 0.0]}
    assert rows(PLAIN, select="pairs") == [{**pair, **known}]
    assert [(row["completion"], row["label"]) for row in rows(PLAIN, select="labels")] == [("4", True), ("5", False)]


def test_the_label_follows_the_threshold():
    assert [row["label"] for row in rows(PLAIN, select="labels", threshold=0.0)] == [True, True]
    assert [row["label"] for row in rows(PLAIN, select="labels", threshold=1.1)] == [False, False]


def test_several_rewards_are_kept_apart():
    group = [Completed(0, "4", 1.5, "completed", 2, {"math": 1.0, "brief": 0.5})]
    config = SampleConfig()
    (row,) = rows_of(PLAIN, "g0", select(group, config), config)
    assert row["rewards"] == {"math": 1.0, "brief": 0.5}


def test_tools_stand_in_their_own_column():
    tools = [{"type": "function", "function": {"name": "add"}}]
    (row,) = rows(Prompt("train/2", (1,), MESSAGES, metadata={"tools": tools, "origin": "x"}))
    assert row["tools"] == tools and row["metadata"] == {"origin": "x"}


@pytest.mark.parametrize("prompt", [PLAIN, CHAT], ids=["text", "messages"])
@pytest.mark.parametrize(
    "chosen,task",
    [
        *(("best", "sft"), ("all", "sft"), ("pairs", "preference"), ("pairs", "reward")),
        *(("pairs", "unpaired"), ("labels", "unpaired")),
    ],
)
def test_rows_are_read_as_training_data(tmp_path: Path, tiny_qwen: Path, prompt: Prompt, chosen: str, task: str):
    written = rows(prompt, select=chosen)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in written))
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen)
    data = prepare(DataConfig(cache_dir=str(tmp_path / "cache")), str(file), tokenizer, task=task)
    samples = [sample for unit in data for sample in unit.samples]
    trained = [
        tokenizer.decode([t for t, m in zip(s.tokens, s.loss_mask, strict=True) if m], skip_special_tokens=True)
        for s in samples
    ]
    answers = {"best": ["4"], "all": ["4", "5"], "pairs": ["4", "5"], "labels": ["4", "5"]}[chosen]
    assert [text.strip() for text in trained] == answers  # of messages too, the answer alone is trained
    assert all(unit.columns.get("margins", 1.0) == 1.0 for unit in data)
