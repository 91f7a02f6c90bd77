"""Preparation: tokens and masks on disk, what is cut, what is refused, what is held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from whet.config.data import DataConfig
from whet.data import prepare as prepare_module
from whet.data import tokenise
from whet.data.encode import Encoder
from whet.data.prepare import prepare, preview
from whet.errors import DataError, ModelError
from whet.models.tiny import make_tokenizer
from whet.types import Sample, Unit

Settings = Callable[..., DataConfig]
Write = Callable[..., str]


def pair(prompt: int, response: int) -> dict[str, str]:
    """A row whose prompt and response have so many bytes; EOS comes on top."""
    return {"prompt": "p" * prompt, "response": "r" * response}


def test_a_pair_becomes_a_unit_of_one_sample(settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast):
    prepared = prepare(settings(), write_rows(pair(3, 2), pair(1, 1)), tokenizer)
    eos = tokenizer.eos_token_id
    assert len(prepared) == 2
    assert prepared[0] == Unit("train/0", (Sample((*b"ppprr", eos), (False, False, False, True, True, True)),))
    assert [unit.id for unit in prepared] == ["train/0", "train/1"]
    assert prepared.lengths.tolist() == [6, 3]
    assert prepared.origin(1).endswith("train.jsonl:2")
    # 6 + 3 tokens, of which 3 + 2 are trained.
    assert (prepared.report.rows, prepared.report.tokens, prepared.report.trained_tokens) == (2, 9, 5)
    assert (prepared.report.longest, prepared.report.truncated, prepared.report.dropped) == (6, 0, 0)


# Rows of 6, 10 and 12 tokens under a limit of 8; of the last, the prompt alone has 9.
ROWS = [pair(3, 2), pair(3, 6), pair(9, 2)]


def test_truncation_cuts_the_end_and_drops_what_is_left_without_a_trained_token(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    prepared = prepare(settings(max_length=8, max_cut_share=1), write_rows(*ROWS), tokenizer)
    assert [unit.id for unit in prepared] == ["train/0", "train/1"]
    assert prepared[1].samples[0].tokens == tuple(b"ppprrrrr")
    assert prepared[1].samples[0].loss_mask == (False,) * 3 + (True,) * 5
    report = prepared.report
    assert (report.rows, report.truncated, report.dropped, report.untrained, report.longest) == (3, 1, 1, 1, 12)
    assert (report.tokens, report.trained_tokens) == (14, 8)
    assert (report.truncated_share, report.dropped_share) == (1 / 3, 1 / 3)
    assert str(report) == "3 rows, 14 tokens, 8 of them trained; longest 12; truncated 1 (33.3%), dropped 1 (33.3%)"


def test_rows_that_are_too_long_are_dropped_on_request_and_ids_stay(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    cfg = settings(max_length=8, max_cut_share=1, on_too_long="drop")
    prepared = prepare(cfg, write_rows(ROWS[1], ROWS[0], ROWS[2]), tokenizer)
    assert [unit.id for unit in prepared] == ["train/1"]
    assert prepared.origin(0).endswith(":2")
    report = prepared.report
    assert (report.rows, report.truncated, report.dropped, report.untrained, report.longest) == (3, 0, 2, 0, 12)


def test_rows_that_are_too_long_are_errors_on_request(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    with pytest.raises(DataError) as caught:
        prepare(settings(max_length=8, on_too_long="error"), write_rows(*ROWS), tokenizer)
    assert "2 rows cannot be used (2 too long)" in str(caught.value)
    assert "train.jsonl:2: the row has 10 tokens, but data.max_length is 8; raise it" in str(caught.value)
    assert "train.jsonl:3: the row has 12 tokens" in str(caught.value)


def test_too_many_cut_rows_are_refused_with_the_limit_that_would_do(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    path = write_rows(*ROWS)
    # Two of three rows are cut. Under a limit of 10 it would be one of three, which 0.34 allows.
    with pytest.raises(DataError) as caught:
        prepare(settings(max_length=8, max_cut_share=0.34), path, tokenizer)
    assert str(caught.value).startswith(
        "2 of 3 rows (66.7%) are longer than data.max_length (8 tokens): 1 truncated, 1 dropped (1 with no trained "
        "token left); the longest has 12; data.max_cut_share allows 34.0%; raise data.max_length to 10"
    )
    assert prepare(settings(max_length=10, max_cut_share=0.34), path, tokenizer).report.dropped == 0


def test_a_limit_that_leaves_nothing_is_an_error(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    with pytest.raises(DataError, match=r"none of 1 rows is left: .*data\.max_length \(8 tokens\).*shortest has 12"):
        prepare(settings(max_length=8, max_cut_share=1), write_rows(ROWS[2]), tokenizer)


def test_a_template_that_rewrites_history_makes_a_unit_of_several_samples(
    settings: Settings, write_rows: Write, make_chat: Callable[..., PreTrainedTokenizerFast]
):
    tokenizer = make_chat("thinking")
    turns = [("user", "a"), ("assistant", "eins"), ("user", "b"), ("assistant", "zwei")]
    path = write_rows({"messages": [{"role": role, "content": content} for role, content in turns]}, name="chat.jsonl")
    prepared = prepare(settings(), path, tokenizer)
    first, second = prepared[0].samples
    assert tokenizer.decode([t for t, on in zip(first.tokens, first.loss_mask, strict=True) if on]).endswith(
        "eins<|im_end|>"
    )
    assert prepared.lengths.tolist() == [len(first.tokens) + len(second.tokens)]
    assert preview(prepared, tokenizer, 0, sample=1)[1] == ("<think>\n\n</think>\n\nzwei<|im_end|>", True)
    # The second sample alone is too long: the first stays whole.
    cut = prepare(settings(max_length=len(first.tokens) + 1, max_cut_share=1), path, tokenizer)
    assert cut[0].samples == (first,)
    assert (cut.report.truncated, cut.report.dropped) == (1, 0)


def test_a_preview_shows_stretches_of_text_and_whether_they_are_trained(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    rows = [{"messages": [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "三 🐫"}]}]
    assert preview(prepare(settings(), write_rows(*rows), tokenizer), tokenizer, 0) == [
        ("<|im_start|>user\nGrüße<|im_end|>\n<|im_start|>assistant\n", False),
        ("三 🐫<|im_end|>", True),
        ("\n", False),
    ]


def test_everything_wrong_is_told_at_once(settings: Settings, write_rows: Write, make_chat: Callable):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"messages": [user, answer]}, {"messages": [user]}, "{", {"messages": [{**user, "role": "system"}, answer]}]
    with pytest.raises(DataError) as caught:
        prepare(settings(), write_rows(*rows), make_chat("inst"))
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 rows cannot be used (1 nothing to train, 1 broken JSON, 1 refused by the template):"
    assert [line.partition(": ")[0].rpartition(":")[2] for line in lines[1:]] == ["2", "3", "4"]


def test_nothing_is_tokenised_once_a_row_is_known_to_be_wrong(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("rows were tokenised"))
    with pytest.raises(DataError, match=r"train\.jsonl:1: field 'response' is null"):
        prepare(settings(), write_rows({"prompt": "a", "response": None}, *ROWS), tokenizer)


def test_a_file_without_chat_template_fails_before_any_row_is_tokenised(settings: Settings, write_rows: Write):
    with pytest.raises(ModelError, match=r"no chat template.*set model\.chat_template"):
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        prepare(settings(), write_rows(row), make_tokenizer("bytes", chat_template=False))


@pytest.fixture
def num_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that rows are tokenised rather than read from the cache."""
    builds: list[int] = []
    build = prepare_module._build

    def counted(*args, **kwargs):
        builds.append(1)
        return build(*args, **kwargs)

    monkeypatch.setattr(prepare_module, "_build", counted)
    return builds


def test_rows_are_tokenised_once_whatever_the_file_is_called(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast, num_builds: list[int]
):
    first = prepare(settings(), write_rows(*ROWS), tokenizer)
    second = prepare(
        settings(shuffle=False, max_cut_share=1), write_rows(*ROWS, name="other.jsonl"), tokenizer, what="eval"
    )
    assert len(num_builds) == 1
    assert [unit.samples for unit in first] == [unit.samples for unit in second]
    assert isinstance(second.arrays.tokens, np.memmap)
    assert (second[0].id, second.origin(2).rpartition("/")[2]) == ("eval/0", "other.jsonl:3")
    assert first.fingerprint == second.fingerprint and first.report == second.report


CHANGES = {
    "settings": {"prompt_template": "Q: {prompt}"},
    "limit": {"max_length": 100},
    "policy": {"on_too_long": "drop"},
    "columns": {"columns": {"prompt": "response", "response": "prompt"}},
    "what is trained": {"train_on": "all"},
    "chat": {"chat": "always"},
    "variables of the template": {"template_kwargs": {"enable_thinking": False}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whatever_tokens_follow_from_makes_another_entry(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast, num_builds: list[int], change: dict
):
    path = write_rows(*ROWS)
    prepare(settings(), path, tokenizer)
    prepare(settings(**change), path, tokenizer)
    assert len(num_builds) == 2


def test_other_content_another_slice_or_tokenizer_makes_another_entry(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast, num_builds: list[int]
):
    path = write_rows(*ROWS)
    prepare(settings(), path, tokenizer)
    prepare(settings(), f"{path}@[0:2]", tokenizer)
    prepare(settings(), path, make_tokenizer("bpe", corpus=["pp rr"]))
    Path(path).write_text(Path(path).read_text().replace("ppp", "qqq"))
    assert prepare(settings(), path, tokenizer)[0].samples[0].tokens[:3] == tuple(b"qqq")
    assert len(num_builds) == 4


def test_the_cache_keeps_to_its_size(settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast):
    def entries() -> set[str]:
        return {path.name for path in Path(settings().cache_dir or "").iterdir()}

    prepare(settings(), write_rows(*ROWS), tokenizer)
    (first,) = entries()
    prepare(settings(), write_rows(ROWS[0], name="other.jsonl"), tokenizer)
    assert len(entries()) == 2
    prepare(settings(cache_gb=1e-6), write_rows(ROWS[1], name="third.jsonl"), tokenizer)
    assert len(entries()) == 1 and first not in entries()
    # A run that reads what is there removes nothing.
    prepare(settings(), write_rows(*ROWS), tokenizer)
    prepare(settings(cache_gb=1e-6), write_rows(ROWS[1], name="third.jsonl"), tokenizer)
    assert len(entries()) == 2


def test_a_damaged_entry_is_made_anew(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast, num_builds: list[int]
):
    path = write_rows(*ROWS)
    before = [unit.samples for unit in prepare(settings(), path, tokenizer)]
    (array,) = Path(settings().cache_dir or "").rglob("tokens.npy")
    array.write_bytes(array.read_bytes()[:-1] + b"\x01")
    assert [unit.samples for unit in prepare(settings(), path, tokenizer)] == before
    assert len(num_builds) == 2


def test_rows_that_cannot_be_used_leave_no_entry(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    with pytest.raises(DataError):
        prepare(settings(), write_rows({"prompt": "a", "response": None}), tokenizer)
    assert not Path(settings().cache_dir or "").exists()


def test_chunks_do_not_show_in_the_result(
    settings: Settings, write_rows: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    tokenizer = make_tokenizer("bpe", corpus=["prompt pp response rr"] * 5)
    path = write_rows(*(pair(i % 7 + 1, i % 5 + 1) for i in range(50)))
    whole = prepare(settings(), path, tokenizer)
    monkeypatch.setattr(tokenise, "_CHUNK", 1)
    seen: list[int] = []
    alone = prepare(settings(cache_dir=str(tmp_path / "other")), path, tokenizer, progress=seen.append)
    assert [unit.samples for unit in alone] == [unit.samples for unit in whole]
    assert seen == list(range(1, 51))


def ids(units: Sequence[Unit]) -> list[str]:
    return [unit.id.partition("/")[2] for unit in units]


def test_held_out_rows_follow_from_seed_and_content(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    rows = [{"prompt": f"{i}", "response": "r"} for i in range(400)]
    prepared = prepare(settings(), write_rows(*rows), tokenizer)
    train, held = prepared.hold_out(0.25, seed=0)
    # 400 draws at 1/4: 100, standard deviation 8.7.
    assert 65 < len(held) < 135 and len(train) + len(held) == 400
    assert set(ids(train)).isdisjoint(ids(held))
    assert {unit.id.partition("/")[0] for unit in held} == {"eval"}
    assert train.report.tokens + held.report.tokens == prepared.report.tokens
    assert (train.report.rows, held.report.rows) == (len(train), len(held))
    assert train.lengths.tolist() == [len(unit.samples[0].tokens) for unit in train]
    assert ids(prepared.hold_out(0.25, seed=0)[1]) == ids(held)
    assert ids(prepared.hold_out(0.25, seed=1)[1]) != ids(held)
    # Half of the rows: the same of them are held out.
    fewer = prepare(settings(), write_rows(*rows[:200], name="fewer.jsonl"), tokenizer).hold_out(0.25, seed=0)[1]
    assert ids(fewer) == [number for number in ids(held) if int(number) < 200]
    assert len({prepared.fingerprint, train.fingerprint, held.fingerprint}) == 3


def test_equal_rows_are_on_the_same_side(settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast):
    rows = [{"prompt": f"{i % 20}", "response": "r"} for i in range(100)]
    train, held = prepare(settings(), write_rows(*rows), tokenizer).hold_out(0.3, seed=0)
    assert {unit.samples[0].tokens for unit in train}.isdisjoint({unit.samples[0].tokens for unit in held})
    assert len(train) + len(held) == 100


def test_a_split_with_an_empty_side_is_an_error(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    prepared = prepare(settings(), write_rows(*ROWS), tokenizer)
    with pytest.raises(
        DataError, match=r"data\.eval_share is 0\.001, and of 3 rows none is left for evaluation; change"
    ):
        prepared.hold_out(0.001, seed=1)


def test_the_share_of_rows_that_train_a_stop_token(
    settings: Settings, write_rows: Write, tokenizer: PreTrainedTokenizerFast
):
    prepared = prepare(settings(max_length=8, max_cut_share=1), write_rows(*ROWS), tokenizer)
    # Of the two rows left, the second was cut before its end. No row trains a "p", though all have one.
    assert prepared.share_training_one_of([tokenizer.eos_token_id]) == 0.5
    assert prepared.share_training_one_of([tokenizer.eos_token_id, ord("r")]) == 1
    assert prepared.share_training_one_of([ord("p")]) == 0
    whole = prepare(settings(), write_rows(*({"prompt": "p", "response": f"{i}"} for i in range(40))), tokenizer)
    train, held = whole.hold_out(0.5, seed=0)
    shares = [np.mean([ord("1") in unit.samples[0].tokens for unit in part]) for part in (train, held)]
    assert [part.share_training_one_of([ord("1")]) for part in (train, held)] == pytest.approx(shares)
    assert shares[0] != shares[1]


def test_a_template_of_the_configuration_must_hold_its_place():
    with pytest.raises(ValueError, match=r"'Question:' has no {prompt}; put it where the text of the row goes"):
        DataConfig(prompt_template="Question:")
    with pytest.raises(ValueError, match=r"has no {response}"):
        DataConfig(response_template="{prompt}")


def test_real_problems_become_their_own_text(shared_data: Path, settings: Settings, tokenizer: PreTrainedTokenizerFast):
    cfg = settings(columns={"prompt": "question", "response": "answer"}, prompt_template="Q: {prompt}\nA: ")
    prepared = prepare(cfg, str(shared_data / "gsm8k_train.jsonl@[0:500]"), tokenizer)
    lines = (shared_data / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:500]
    assert len(prepared) == 500
    for i, line in enumerate(lines):
        row = json.loads(line)
        assert preview(prepared, tokenizer, i) == [
            (f"Q: {row['question']}\nA: ", False),
            (f"{row['answer']}<|im_end|>", True),
        ]
    assert prepared.report.trained_tokens == sum(len(json.loads(line)["answer"].encode()) + 1 for line in lines)
