"""Rendering and masks: what is trained is exactly what the assistant says and the token that ends it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from whet.config.data import DataConfig
from whet.data.encode import Encoded, Encoder
from whet.data.problems import Malformed, Problems
from whet.data.recognise import read_items
from whet.data.rows import parse_sources
from whet.data.shapes import SFT_SHAPES, Conversation, PromptRow, Text, TextPair
from whet.data.template import Renderer
from whet.errors import ModelError
from whet.models.tiny import make_tokenizer


def chat(*contents: str, first: str = "user") -> list[dict[str, Any]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def trained(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> list[str]:
    """The trained stretches of a sequence, as text."""
    stretches: list[list[int]] = []
    for i, (token, on) in enumerate(zip(encoded.tokens.tolist(), encoded.mask.tolist(), strict=True)):
        if on and i and encoded.mask[i - 1]:
            stretches[-1].append(token)
        elif on:
            stretches.append([token])
    return [tokenizer.decode(ids) for ids in stretches]


def encode(tokenizer: PreTrainedTokenizerFast, item: Any, **settings: Any) -> list[Encoded]:
    return Encoder(tokenizer).encode(Renderer(DataConfig(**settings), tokenizer).sequences(item))


def test_the_mask_of_a_small_conversation_counted_by_hand(tokenizer: PreTrainedTokenizerFast):
    (sequence,) = encode(tokenizer, Conversation(chat("hi", "ho")))
    # <|im_start|> user\n hi <|im_end|> \n = 1 + 5 + 2 + 1 + 1 = 10; <|im_start|> assistant\n = 1 + 10 = 11;
    # ho <|im_end|> = 3, trained; \n = 1.
    assert sequence.mask.tolist() == [False] * 21 + [True] * 3 + [False]
    assert sequence.tokens[21:24].tolist() == [*b"ho", tokenizer.eos_token_id]


EXPECTED = {
    "chatml": ["eins<|im_end|>", "zwei<|im_end|>"],
    "llama3": ["eins<|eot_id|>", "zwei<|eot_id|>"],
    "default_system": ["eins<|im_end|>", "zwei<|im_end|>"],
    "inst": [" eins<|im_end|>", " zwei<|im_end|>"],
    "no_prompt": ["eins<|im_end|>", "zwei<|im_end|>"],
}


@pytest.mark.parametrize("template", EXPECTED)
def test_each_turn_is_trained_with_its_end_and_the_tokens_are_the_templates_own(
    make_chat: Callable[..., PreTrainedTokenizerFast], template: str
):
    tokenizer = make_chat(template, bos=True)
    messages = chat("a", "eins", "b", "zwei")
    (sequence,) = encode(tokenizer, Conversation(messages))
    assert trained(tokenizer, sequence) == EXPECTED[template]
    assert sequence.tokens.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]


@pytest.mark.parametrize("template", EXPECTED)
def test_what_follows_the_last_answer_is_left_out(make_chat: Callable[..., PreTrainedTokenizerFast], template: str):
    tokenizer = make_chat(template)
    answered = encode(tokenizer, Conversation(chat("a", "eins", "b", "zwei")))
    asked_again = encode(tokenizer, Conversation(chat("a", "eins", "b", "zwei", "c")))
    assert [s.tokens.tolist() for s in asked_again] == [s.tokens.tolist() for s in answered]


@pytest.mark.parametrize("template", ["chatml", "llama3", "default_system", "no_prompt"])
def test_an_assistant_that_speaks_first_is_trained_without_its_header(
    make_chat: Callable[..., PreTrainedTokenizerFast], template: str
):
    tokenizer = make_chat(template)
    (sequence,) = encode(tokenizer, Conversation(chat("null", "a", "eins", first="assistant")))
    end = "<|eot_id|>" if template == "llama3" else "<|im_end|>"
    assert trained(tokenizer, sequence) == [f"null{end}", f"eins{end}"]


def test_a_template_that_strips_thoughts_gives_each_turn_the_history_it_was_generated_with(
    make_chat: Callable[..., PreTrainedTokenizerFast],
):
    tokenizer = make_chat("thinking")
    messages = chat("a", "<think>\nhm\n</think>\n\neins", "b", "zwei")
    sequences = encode(tokenizer, Conversation(messages))
    assert [trained(tokenizer, sequence) for sequence in sequences] == [
        ["<think>\nhm\n</think>\n\neins<|im_end|>"],
        ["<think>\n\n</think>\n\nzwei<|im_end|>"],
    ]
    full = tokenizer.apply_chat_template(messages)["input_ids"]
    assert sequences[1].tokens.tolist() == full
    assert "hm" not in tokenizer.decode(full)
    for sequence, upto in zip(sequences, (1, 3), strict=True):
        prompt = tokenizer.apply_chat_template(messages[:upto], add_generation_prompt=True)["input_ids"]
        assert sequence.tokens[: len(prompt)].tolist() == prompt
        assert sequence.mask.tolist().index(True) == len(prompt)


def test_a_thought_that_the_prompt_opens_is_trained_from_there(make_chat: Callable[..., PreTrainedTokenizerFast]):
    tokenizer = make_chat("open_thought")
    (sequence,) = encode(tokenizer, Conversation(chat("a", "<think>hm</think>eins", "b", "zwei")))
    assert trained(tokenizer, sequence) == ["hm\n</think>\n\neins<|im_end|>", "\n</think>\n\nzwei<|im_end|>"]


def test_a_token_that_closes_the_conversation_is_not_part_of_a_turn(make_chat: Callable[..., PreTrainedTokenizerFast]):
    tokenizer = make_chat("closed")
    messages = chat("a", "eins", "b", "zwei")
    (sequence,) = encode(tokenizer, Conversation(messages))
    assert trained(tokenizer, sequence) == ["eins<|eot_id|>", "zwei<|eot_id|>"]
    assert [*sequence.tokens, tokenizer.eos_token_id] == tokenizer.apply_chat_template(messages)["input_ids"]


def test_two_tokens_that_end_every_turn_both_belong_to_it(make_chat: Callable[..., PreTrainedTokenizerFast]):
    tokenizer = make_chat()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\\n", "<|eot_id|><|im_end|>")
    (sequence,) = encode(tokenizer, Conversation(chat("a", "eins", "b", "zwei")))
    assert trained(tokenizer, sequence) == ["eins<|eot_id|><|im_end|>", "zwei<|eot_id|><|im_end|>"]


def test_a_turn_without_an_end_of_its_own_ends_by_giving_the_floor(make_chat: Callable[..., PreTrainedTokenizerFast]):
    tokenizer = make_chat("floor")
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    messages = [
        *chat("a"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        *chat("eins", "b", "zwei", first="assistant"),
    ]
    (sequence,) = encode(tokenizer, Conversation(messages))
    assert trained(tokenizer, sequence) == ["<tool_call>add</tool_call><|observation|>", "eins<|user|>", "zwei<|user|>"]
    full = tokenizer.apply_chat_template(messages)["input_ids"]
    assert sequence.tokens.tolist() == [*full, tokenizer.convert_tokens_to_ids("<|user|>")]


def test_an_end_of_turn_that_is_not_marked_special_is_one(make_chat: Callable[..., PreTrainedTokenizerFast]):
    tokenizer = make_chat()
    tokenizer.add_tokens(["[END]"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "[END]")
    (sequence,) = encode(tokenizer, Conversation(chat("a", "eins")))
    assert trained(tokenizer, sequence) == ["eins[END]"]


def test_only_turns_after_the_prompt_are_trained(tokenizer: PreTrainedTokenizerFast):
    (sequence,) = encode(tokenizer, Conversation(chat("a", "eins", "b", "zwei"), trained_from=3), system="be kind")
    assert trained(tokenizer, sequence) == ["zwei<|im_end|>"]
    assert tokenizer.decode(sequence.tokens).startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\na")


def test_a_prompt_turned_into_a_generation_prompt_that_the_turn_does_not_begin_with_is_refused(
    make_chat: Callable[..., PreTrainedTokenizerFast],
):
    with pytest.raises(
        Malformed, match=r"renders the assistant message 1 as \.\.\.'eins.*generated after \.\.\.'<think>"
    ):
        encode(make_chat("forced_thought"), Conversation(chat("a", "eins")))


LOSSES = {
    "a thought": ("forced_thought", {"role": "assistant", "content": "<think>hm</think>eins"}, "part of the content"),
    "reasoning": (
        "llama3",
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        "part of the reasoning_content",
    ),
    "a call": (
        "llama3",
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
        "the call of 'add' in message 1",
    ),
}


@pytest.mark.parametrize("template,message,lost", LOSSES.values(), ids=LOSSES.keys())
def test_what_a_template_leaves_out_of_a_trained_turn_is_refused(
    make_chat: Callable[..., PreTrainedTokenizerFast], template: str, message: dict[str, Any], lost: str
):
    tokenizer = make_chat(template)
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\\n", "")
    with pytest.raises(Malformed, match=rf"leaves out {lost}.*set model\.chat_template"):
        encode(tokenizer, Conversation([*chat("q"), message]))


def test_tools_that_a_template_leaves_out_are_refused(make_chat: Callable[..., PreTrainedTokenizerFast]):
    tools = [{"type": "function", "function": {"name": "add"}}]
    with pytest.raises(Malformed, match="leaves out the tool 'add'"):
        encode(make_chat("llama3"), Conversation(chat("a", "b"), tools))


def test_a_template_that_refuses_a_role_is_quoted(make_chat: Callable[..., PreTrainedTokenizerFast]):
    item = Conversation([{"role": "system", "content": "s"}, *chat("a", "b")])
    with pytest.raises(Malformed, match=r"refuses messages of the roles system, user.*: only user and assistant roles"):
        encode(make_chat("inst"), item)


def test_messages_without_a_chat_template_are_an_error_with_remedy():
    tokenizer = make_tokenizer("bytes", chat_template=False)
    with pytest.raises(
        ModelError, match=r"has no chat template, but the data has chat messages .*; set model\.chat_temp"
    ):
        encode(tokenizer, Conversation(chat("a", "b")))


def test_messages_are_refused_when_chat_is_never(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(Malformed, match=r"holds chat messages, but data\.chat is 'never'; set it to 'auto'"):
        encode(tokenizer, Conversation(chat("a", "b")), chat="never")


def test_plain_prompt_and_response_are_used_as_they_are(tokenizer: PreTrainedTokenizerFast):
    (sequence,) = encode(tokenizer, TextPair("1+1=", "2"))
    assert sequence.tokens.tolist() == [*b"1+1=2", tokenizer.eos_token_id]
    assert sequence.mask.tolist() == [False] * 4 + [True] * 2


def test_templates_stand_around_prompt_and_response_whatever_braces_they_hold(tokenizer: PreTrainedTokenizerFast):
    settings = {"prompt_template": "Q {x}: {prompt}\n", "response_template": "A: {response}."}
    (sequence,) = encode(tokenizer, TextPair("{response}", "{prompt}"), **settings)
    assert tokenizer.decode(sequence.tokens) == "Q {x}: {response}\nA: {prompt}.<|im_end|>"
    assert trained(tokenizer, sequence) == ["A: {prompt}.<|im_end|>"]


def test_plain_pairs_become_messages_when_chat_is_always(tokenizer: PreTrainedTokenizerFast):
    pair = TextPair("c", "d", system="s", history=(("a", "b"),))
    messages = [{"role": "system", "content": "s"}, *chat("a", "b", "c", "d")]
    (wrapped,), (given,) = encode(tokenizer, pair, chat="always"), encode(tokenizer, Conversation(messages))
    assert wrapped.tokens.tolist() == given.tokens.tolist()
    assert wrapped.mask.tolist() == given.mask.tolist()


def test_what_only_a_chat_template_can_hold_is_not_dropped_from_a_plain_pair(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(
        Malformed, match=r"has system and history, which only a chat template can render; set data\.chat to 'always'"
    ):
        encode(tokenizer, TextPair("c", "d", system="s", history=(("a", "b"),)))


def test_text_is_trained_throughout_with_an_end(tokenizer: PreTrainedTokenizerFast):
    (sequence,) = encode(tokenizer, Text("abc"))
    assert sequence.tokens.tolist() == [*b"abc", tokenizer.eos_token_id]
    assert sequence.mask.tolist() == [False, True, True, True]  # nothing predicts the first token


@pytest.mark.parametrize("item", [TextPair("ab", "c"), Conversation(chat("a", "b", "c"))])
def test_every_token_but_the_first_is_trained_on_request(tokenizer: PreTrainedTokenizerFast, item: Any):
    (sequence,) = encode(tokenizer, item, train_on="all")
    assert sequence.mask.tolist() == [False] + [True] * (len(sequence.tokens) - 1)


def test_a_prompt_ends_where_the_answer_begins(make_chat: Callable[..., PreTrainedTokenizerFast]):
    tokenizer = make_chat("default_system")
    messages = chat("a")
    rendered = Renderer(DataConfig(), tokenizer).prompt(PromptRow(messages))
    assert rendered.text == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    plain = Renderer(DataConfig(prompt_template="Q: {prompt}"), tokenizer).prompt(PromptRow("a"))
    assert plain.text == "Q: a"
    wrapped = Renderer(DataConfig(chat="always", system="s"), tokenizer).prompt(PromptRow("a"))
    assert wrapped.text == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


# As Qwen3 does: without thoughts, the prompt holds an empty block, as a turn without any does.
SWITCH = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""


def test_variables_of_the_template_reach_training_rows_and_prompts():
    tokenizer = make_tokenizer("bytes")
    tokenizer.chat_template = SWITCH
    row, prompt = Conversation(chat("a", "b")), PromptRow(chat("a"))
    (sequence,) = encode(tokenizer, row)
    assert trained(tokenizer, sequence) == ["<think>\n\n</think>\n\nb<|im_end|>"]
    assert Renderer(DataConfig(), tokenizer).prompt(prompt).text.endswith("assistant\n")
    settings = {"template_kwargs": {"enable_thinking": False}}
    (sequence,) = encode(tokenizer, row, **settings)
    assert trained(tokenizer, sequence) == ["b<|im_end|>"]
    rendered = Renderer(DataConfig(**settings), tokenizer).prompt(prompt)
    assert rendered.text == tokenizer.apply_chat_template(
        chat("a"), add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert rendered.text.endswith("assistant\n<think>\n\n</think>\n\n")
    # The prompt of the row and the prompt to sample from are the same tokens.
    (asked,) = Encoder(tokenizer).encode([rendered])
    assert asked.tokens.tolist() == sequence.tokens[: sequence.prompt].tolist()


def test_a_variable_that_the_template_never_reads_is_refused(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(
        ModelError, match=r"data\.template_kwargs gives 'thinking', but the chat template never reads it"
    ):
        encode(tokenizer, Conversation(chat("a", "b")), template_kwargs={"thinking": False})
    # Where no template is used, none is asked.
    assert encode(tokenizer, TextPair("a", "b"), template_kwargs={"thinking": False})


def test_rendering_itself_is_not_for_variables():
    with pytest.raises(ValueError, match=r"add_generation_prompt, tokenize is decided by how rows are rendered"):
        DataConfig(template_kwargs={"tokenize": True, "add_generation_prompt": True, "x": 1})


# Not surrogates, which are no text, nor what blends with the special tokens of the template.
CONTENT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), min_size=1)


@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4))
def test_the_trained_tokens_spell_the_answers_and_nothing_else(turns: list[tuple[str, str]]):
    tokenizer = make_tokenizer("bytes")
    (sequence,) = encode(tokenizer, Conversation(chat(*(text for turn in turns for text in turn))))
    spelled = tokenizer.decode(sequence.tokens[sequence.mask])
    assert spelled == "".join(f"{answer}<|im_end|>" for _, answer in turns)


def test_real_tool_calls_are_trained_and_their_results_are_not(tokenizer: PreTrainedTokenizerFast, shared_data: Path):
    problems = Problems()
    sources = parse_sources(f"{shared_data / 'glaive_toolcall_en_demo.json'}@[0:60]")
    renderer, encoder = Renderer(DataConfig(), tokenizer), Encoder(tokenizer)
    num_calls = 0
    for placed in read_items(sources, {}, SFT_SHAPES, problems):
        assert isinstance(placed.item, Conversation)
        (sequence,) = encoder.encode(renderer.sequences(placed.item))
        turns = [message for message in placed.item.messages if message["role"] == "assistant"]
        stretches = trained(tokenizer, sequence)
        assert len(stretches) == len(turns)
        for stretch, turn in zip(stretches, turns, strict=True):
            for call in turn.get("tool_calls", ()):
                assert stretch.startswith("<tool_call>") and call["function"]["name"] in stretch
                num_calls += 1
            assert turn["content"] in stretch and stretch.endswith("<|im_end|>")
        assert set(tokenizer.decode(sequence.tokens).split("<|im_start|>tool\n")[1:]).isdisjoint(stretches)
    assert num_calls > 10 and not problems
