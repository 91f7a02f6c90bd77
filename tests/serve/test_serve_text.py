"""Text from tokens as they come: whole characters, and nothing of a stop text."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from whet.serve.text import Text


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen):
    return AutoTokenizer.from_pretrained(tiny_qwen)


def told(text: Text, tokens: list[int], size: int) -> list[str]:
    pieces = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return [text.add(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("said", "stop", "expected"),
    [
        ("naïve 茶 tea", (), "naïve 茶 tea"),
        ("one two three", ("two",), "one "),
        ("one tw", ("two",), "one tw"),  # the beginning of a stop text is told at the end
        ("ababc", ("abc",), "ab"),
        ("aabab", ("bb", "bab"), "aa"),
        ("茶茶é", ("é",), "茶茶"),
    ],
)
def test_pieces_of_any_size_give_the_same_text(tokenizer, said, stop, expected, size):
    pieces = told(Text(tokenizer, stop=stop), list(said.encode()), size)
    assert "".join(pieces) == expected
    assert not any("�" in piece for piece in pieces)


def test_what_may_become_a_stop_text_is_held_back_and_no_more(tokenizer):
    text = Text(tokenizer, stop=("two", "wol"))
    assert [text.add([byte]) for byte in b"a two"] == ["a", " ", "", "", ""]
    text = Text(tokenizer, stop=("two",))
    assert [text.add([byte]) for byte in b"twt"] == ["", "", "tw"]


def test_a_stop_token_at_the_end_is_no_text_but_in_the_middle_it_is_what_it_is(tokenizer):
    assert Text(tokenizer, ends=frozenset([98])).add(list(b"abab"), last=True) == "aba"
    assert Text(tokenizer).add([*b"ab", 258], last=True) == "ab"
    assert Text(tokenizer, keep_special=True).add([*b"ab", 258], last=True) == "ab<|im_end|>"


def test_half_a_character_at_the_end_is_told_as_such(tokenizer):
    assert "".join(told(Text(tokenizer), list("a茶".encode())[:-1], 1)) == "a�"
