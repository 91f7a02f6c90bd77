"""Prompts: tokens up to the answer, labels kept as they are, long ones dropped with a count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from whet.config.data import DataConfig
from whet.data.prompts import prepare_prompts
from whet.errors import DataError, ModelError
from whet.models.tiny import make_tokenizer
from whet.types import Prompt

Settings = Callable[..., DataConfig]
Write = Callable[..., str]
USER = {"role": "user", "content": "hi"}


def test_a_plain_prompt_is_used_as_it_is(settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast):
    path = write_rows({"prompt": "1-1=", "label": 0, "metadata": {"level": 1}}, {"prompt": "é"})
    prompts = prepare_prompts(settings(), path, tokenizer)
    assert list(prompts) == [
        Prompt("train/0", tuple(b"1-1="), "1-1=", 0, {"level": 1}),
        Prompt("train/1", tuple("é".encode()), "é", None, {}),
    ]
    assert (prompts.report.rows, prompts.report.tokens, prompts.report.longest) == (2, 6, 4)


def test_messages_end_with_the_generation_prompt(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    tool = {"type": "function", "function": {"name": "add"}}
    prompts = prepare_prompts(settings(system="be"), write_rows({"prompt": [USER], "tools": [tool]}), tokenizer)
    messages = [{"role": "system", "content": "be"}, USER]
    wanted = tokenizer.apply_chat_template(messages, tools=[tool], add_generation_prompt=True)["input_ids"]
    assert prompts[0].tokens == tuple(wanted)
    assert (prompts[0].content, prompts[0].metadata) == ([USER], {"tools": [tool]})


def test_plain_prompts_become_messages_when_chat_is_always(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    cfg = settings(chat="always", prompt_template="say {prompt}", columns={"prompt": "q", "label": "a"})
    (prompt,) = prepare_prompts(cfg, write_rows({"q": "hi", "a": "ho"}), tokenizer)
    text = "<|im_start|>user\nsay hi<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.decode(prompt.tokens), prompt.content, prompt.label) == (text, "hi", "ho")


def test_bos_begins_a_plain_prompt_where_the_tokenizer_says_so(
    settings: Settings, write_rows: Write, make_chat: Callable[..., PreTrainedTokenizerFast]
):
    tokenizer = make_chat(bos=True)
    prompts = prepare_prompts(settings(), write_rows({"prompt": "a"}), tokenizer)
    assert prompts[0].tokens == (tokenizer.bos_token_id, *b"a")


def test_long_prompts_are_dropped_with_a_count(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    path = write_rows({"prompt": "a" * 9}, {"prompt": "bb"}, {"prompt": "ccc"})
    prompts = prepare_prompts(settings(max_prompt_length=3, max_cut_share=0.5), path, tokenizer)
    assert [prompt.id for prompt in prompts] == ["train/1", "train/2"]
    report = prompts.report
    assert (report.rows, report.dropped, report.longest, report.tokens) == (3, 1, 9, 5)
    assert str(report) == "3 prompts, 5 tokens; longest 9; dropped 1 (33.3%)"
    with pytest.raises(
        DataError, match=r"2 of 3 rows \(66\.7%\) are dropped, .*max_prompt_length \(2 tokens\).*allows 50"
    ):
        prepare_prompts(settings(max_prompt_length=2, max_cut_share=0.5), path, tokenizer)
    with pytest.raises(DataError, match=r"all 3 prompts are longer than data\.max_prompt_length"):
        prepare_prompts(settings(max_prompt_length=1, max_cut_share=1), path, tokenizer)


def test_malformed_rows_are_errors_with_file_and_line(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    path = write_rows({"prompt": "a"}, {"prompt": None}, {"label": 3})
    with pytest.raises(DataError) as caught:
        prepare_prompts(settings(), path, tokenizer)
    assert f"{path}:2: field 'prompt' is null; expected text" in str(caught.value)
    assert f"{path}:3: field 'prompt' is missing" in str(caught.value)


def test_messages_without_a_template_are_an_error(settings: Settings, write_rows: Write):
    with pytest.raises(ModelError, match="no chat template"):
        prepare_prompts(settings(), write_rows({"prompt": [USER]}), make_tokenizer("bytes", chat_template=False))


def test_held_out_prompts_follow_from_seed_and_content(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    rows = [{"prompt": f"{i}", "label": i} for i in range(200)]
    prompts = prepare_prompts(settings(), write_rows(*rows), tokenizer)
    train, held = prompts.hold_out(0.25, seed=3)
    assert 25 < len(held) < 75 and len(train) + len(held) == 200
    assert {prompt.label for prompt in train}.isdisjoint({prompt.label for prompt in held})
    assert all(prompt.id == f"eval/{prompt.label}" for prompt in held)
    assert (train.report.rows, held.report.rows) == (len(train), len(held))
    assert train.report.tokens + held.report.tokens == prompts.report.tokens
    assert [prompt.id for prompt in prompts.hold_out(0.25, seed=3)[1]] == [prompt.id for prompt in held]


def test_real_problems_are_prompts_with_their_answer_as_label(
    shared_data: Path, settings: Settings, tokenizer: PreTrainedTokenizerFast
):
    cfg = settings(columns={"prompt": "question", "label": "answer"})
    prompts = prepare_prompts(cfg, str(shared_data / "gsm8k_test.jsonl"), tokenizer, what="eval")
    assert len(prompts) == 1319
    assert prompts[0].id == "eval/0" and prompts[0].label.endswith("#### 18")
    assert tokenizer.decode(prompts[0].tokens) == prompts[0].content


def test_a_system_message_beside_a_text_is_kept_with_it(tokenizer, write_rows, settings):
    row = {"prompt": "Hi", "system": "Be brief."}
    prompts = prepare_prompts(settings(chat="always", prompt_template="<{prompt}>"), write_rows(row), tokenizer)
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<Hi>"}]
    assert prompts[0].content == said
    again = prepare_prompts(settings(), write_rows({"prompt": said}), tokenizer)
    assert again[0].tokens == prompts[0].tokens  # rows made of it are asked in the same words
