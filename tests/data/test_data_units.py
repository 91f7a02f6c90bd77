"""Rows as units: where a prompt ends that no column gives, what is cut off, what is no preference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from whet.config.data import DataConfig
from whet.data.encode import Encoder
from whet.data.pairs import Judged, Pair
from whet.data.problems import Malformed, Problems
from whet.data.recognise import Placed
from whet.data.rows import Row, Source
from whet.data.shapes import Conversation, Task, Text, TextPair
from whet.data.template import Renderer
from whet.data.units import Draft, drafts, require_margins
from whet.models.tiny import make_tokenizer


def units(tokenizer: PreTrainedTokenizerFast, item: Any, task: Task = "preference") -> list[Draft]:
    renderer, encoder = Renderer(DataConfig(), tokenizer), Encoder(tokenizer)
    render = renderer.sequences if task == "sft" else renderer.sides
    return drafts(task, item, encoder.encode(render(item)), encoder)


def parts(tokenizer: PreTrainedTokenizerFast, draft: Draft) -> list[tuple[str, str]]:
    """What of each sequence is untrained, and what is trained."""
    return [
        tuple(tokenizer.decode(sample.tokens[sample.mask == side].tolist()) for side in (False, True))
        for sample in draft.samples
    ]


def conversation(*contents: str, trained_from: int) -> Conversation:
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return Conversation(messages, trained_from=trained_from)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A tokenizer that has learned some words."""
    return make_tokenizer("bpe", corpus=["how are you? fine un happy un kind 你好吗 你好"] * 50, vocab_size=400)


def test_a_pair_shares_its_prompt_and_is_labelled(tokenizer: PreTrainedTokenizerFast):
    (draft,) = units(tokenizer, Pair(TextPair("abc", "de"), TextPair("abc", "f"), 0.5))
    eos = tokenizer.eos_token_id
    assert [sample.tokens.tolist() for sample in draft.samples] == [[*b"abcde", eos], [*b"abcf", eos]]
    assert [sample.mask.tolist() for sample in draft.samples] == [[False] * 3 + [True] * 3, [False] * 3 + [True] * 2]
    assert (draft.prompt, draft.labels, draft.margin, draft.identical) == (3, (1.0, 0.0), 0.5, False)


def test_whole_texts_share_the_tokens_that_they_begin_with(words: PreTrainedTokenizerFast):
    (draft,) = units(words, Pair(Text("how are you? fine"), Text("how are you? un")))
    assert parts(words, draft) == [("how are you?", " fine<|im_end|>"), ("how are you?", " un<|im_end|>")]
    prompt = words("how are you?")["input_ids"]
    assert draft.samples[0].tokens[: draft.prompt].tolist() == prompt
    # The tokens are those of the whole text: nothing is cut where a token stands.
    assert draft.samples[0].tokens[:-1].tolist() == words("how are you? fine")["input_ids"]


def test_a_prompt_does_not_end_within_a_character(tokenizer: PreTrainedTokenizerFast):
    # 好 is e5 a5 bd and 奾 is e5 a5 be: they have two bytes in common.
    (draft,) = units(tokenizer, Pair(Text("你好"), Text("你奾")))
    assert parts(tokenizer, draft) == [("你", "好<|im_end|>"), ("你", "奾<|im_end|>")]
    assert draft.prompt == 3


@given(start=st.text(max_size=8), ends=st.tuples(st.text(min_size=1, max_size=5), st.text(min_size=1, max_size=5)))
def test_whole_texts_are_spelled_by_their_tokens_however_they_part(start: str, ends: tuple[str, str]):
    tokenizer = make_tokenizer("bytes")
    texts = [start + end for end in ends]
    (draft,) = units(tokenizer, Pair(Text(texts[0]), Text(texts[1])))
    assert [tokenizer.decode(sample.tokens[:-1].tolist()) for sample in draft.samples] == texts
    assert np.array_equal(draft.samples[0].tokens[: draft.prompt], draft.samples[1].tokens[: draft.prompt])
    for sample in draft.samples:
        first = max(1, draft.prompt)
        assert sample.mask.tolist() == [False] * first + [True] * (len(sample.mask) - first)


def test_a_whole_text_that_the_other_begins_with_trains_its_end(tokenizer: PreTrainedTokenizerFast):
    (draft,) = units(tokenizer, Pair(Text("ab"), Text("abc")))
    assert parts(tokenizer, draft) == [("ab", "<|im_end|>"), ("ab", "c<|im_end|>")]


def test_texts_with_nothing_in_common_have_no_prompt(tokenizer: PreTrainedTokenizerFast):
    (draft,) = units(tokenizer, Pair(Text("ab"), Text("cd")))
    assert draft.prompt == 0
    # Nothing predicts the first token.
    assert [sample.mask.tolist() for sample in draft.samples] == [[False, True, True]] * 2


def test_the_start_of_a_text_is_no_prompt(make_chat: Callable[..., PreTrainedTokenizerFast]):
    tokenizer = make_chat(bos=True)
    (draft,) = units(tokenizer, Pair(TextPair("", "ab"), TextPair("", "cd")))
    assert (draft.prompt, draft.samples[0].tokens[0]) == (0, tokenizer.bos_token_id)
    (draft,) = units(tokenizer, Pair(TextPair("q", "ab"), TextPair("q", "cd")))
    assert draft.prompt == 2


@pytest.mark.parametrize("task", ["preference", "reward"])
def test_what_follows_the_end_of_the_turn_is_cut_off(tokenizer: PreTrainedTokenizerFast, task: Task):
    pair = Pair(conversation("q", "good", trained_from=1), conversation("q", "bad", trained_from=1))
    (draft,) = units(tokenizer, pair, task)
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert parts(tokenizer, draft) == [(prompt, "good<|im_end|>"), (prompt, "bad<|im_end|>")]
    assert [int(sample.tokens[-1]) for sample in draft.samples] == [tokenizer.eos_token_id] * 2
    # <|im_start|> user\n q <|im_end|> \n = 1 + 5 + 1 + 1 + 1 = 9; <|im_start|> assistant\n = 11.
    assert draft.prompt == 20
    assert tokenizer.decode(draft.samples[0].tokens[: draft.prompt].tolist()) == prompt


def test_what_is_judged_is_cut_off_as_well(tokenizer: PreTrainedTokenizerFast):
    (draft,) = units(tokenizer, Judged(conversation("q", "x", "r", "good", trained_from=3), False), "unpaired")
    ((_, trained),) = parts(tokenizer, draft)
    assert (trained, draft.labels, draft.samples[0].tokens[-1]) == ("good<|im_end|>", (0.0,), tokenizer.eos_token_id)


def test_rows_to_imitate_keep_what_follows_the_turn(tokenizer: PreTrainedTokenizerFast):
    (draft,) = units(tokenizer, conversation("q", "good", trained_from=0), "sft")
    assert tokenizer.decode(draft.samples[0].tokens.tolist()).endswith("good<|im_end|>\n")
    assert (draft.labels, draft.prompt) == ((), 20)


def test_a_pair_becomes_two_judged_completions(tokenizer: PreTrainedTokenizerFast):
    chosen, rejected = units(tokenizer, Pair(TextPair("abc", "de"), TextPair("abc", "f"), 0.5), "unpaired")
    assert parts(tokenizer, chosen) == [("abc", "de<|im_end|>")]
    assert parts(tokenizer, rejected) == [("abc", "f<|im_end|>")]
    assert (chosen.labels, rejected.labels, chosen.prompt, rejected.prompt) == ((1.0,), (0.0,), 3, 3)
    assert (chosen.margin, rejected.margin) == (None, None)


def test_a_pair_of_twice_the_same_is_no_preference_and_no_judgement(tokenizer: PreTrainedTokenizerFast):
    for pair in (Pair(TextPair("q", "a"), TextPair("q", "a")), Pair(Text("q a"), Text("q a"))):
        assert units(tokenizer, pair, "unpaired") == []
        assert [draft.identical for draft in units(tokenizer, pair)] == [True]


def test_a_preference_between_answers_to_different_questions_is_refused(tokenizer: PreTrainedTokenizerFast):
    pair = Pair(conversation("q", "good", trained_from=0), conversation("r", "good", trained_from=0))
    for task in ("preference", "unpaired"):
        with pytest.raises(Malformed, match=r"chosen and rejected answer different prompts.*; give both the same"):
            units(tokenizer, pair, task)
    # A reward model may well be told which of two conversations is the better one.
    (draft,) = units(tokenizer, pair, "reward")
    assert tokenizer.decode(draft.samples[0].tokens[: draft.prompt].tolist()) == "<|im_start|>user\n"


def test_a_completion_that_the_template_takes_apart_is_refused(make_chat: Callable[..., PreTrainedTokenizerFast]):
    tokenizer = make_chat("thinking")
    turns = conversation("q", "<think>\nx\n</think>\n\na", "r", "b", trained_from=1)
    with pytest.raises(Malformed, match=r"rewrites the first turns of a completion.*let the prompt end with the last"):
        units(tokenizer, Pair(turns, conversation("q", "c", trained_from=1)))
    (draft,) = units(tokenizer, Pair(*(conversation("q", "a", "r", end, trained_from=3) for end in ("b", "c"))))
    assert len(draft.samples) == 2


def margins(*values: float | None) -> list[str]:
    """What is said of rows with these margins."""
    problems, source = Problems(), Source("rows.jsonl")
    items = [
        Placed(i, Row(source, i, {}), Pair(Text("a"), Text("b"), margin)) for i, margin in enumerate(values, start=1)
    ]
    assert list(require_margins(iter(items), problems)) == items
    return problems._shown


def test_margins_are_given_to_all_rows_or_to_none():
    assert margins(None, None) == margins(0.0, 1.0) == []
    said = "; give one to all rows or to none"
    assert margins(0.5, None, 0.0, None) == [
        f"rows.jsonl[{i}]: the row has no margin, but the first (rows.jsonl[1]) has a margin{said}" for i in (2, 4)
    ]
    assert margins(None, 0.0) == [
        f"rows.jsonl[2]: the row has a margin, but the first (rows.jsonl[1]) has no margin{said}"
    ]
