"""Answers are found where a reader would find them."""

from __future__ import annotations

import time

import pytest

from whet.rewards.answers import equal_numbers, label_text, last_boxed, last_number, tidy


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{5} and then \boxed{6, cut off", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \\{b}c}", r"a \\{b}c"),
        (r"\boxed {7}", "7"),
        (r"\fbox{8}", "8"),
        (r"} \boxed{9}", "9"),
        (r"\boxed{}", ""),
        (r"\boxed{cut off", None),
        ("no box", None),
    ],
)
def test_the_last_balanced_box_is_found(text: str, answer: str | None):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("A: 18", "18"),
        ("it costs $1,234.50.", "1,234.50"),
        ("16-3", "3"),
        ("it is -3.", "-3"),
        ("so (−4)", "−4"),
        ("one half, 1/2", "1/2"),
        ("that is 50%", "50%"),
        ("1, 2, 3", "3"),
        (".5", ".5"),
        ("none", None),
    ],
)
def test_the_last_number_is_read_with_its_sign_and_thousands(text: str, number: str | None):
    assert last_number(text) == number


def test_looking_for_an_answer_takes_linear_time():
    start = time.monotonic()
    assert last_boxed(r"\boxed{" * 50_000) is None
    assert last_number("1,111" * 50_000) is not None
    assert time.monotonic() - start < 2.0


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (0.00001, "0.00001"),
        ("so it is 4.\n#### 1,072", "1,072"),
        (r"because \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (" $x+1$ ", "x+1"),
    ],
)
def test_a_label_is_a_number_or_a_text_that_ends_in_one(label: object, text: str):
    assert label_text(label) == text


@pytest.mark.parametrize("label", [None, "", "  ", True, [5], r"\boxed{}"])
def test_a_label_without_an_answer_is_refused(label: object):
    with pytest.raises(ValueError, match="label is"):
        label_text(label)


def test_white_space_dollars_and_a_full_stop_are_no_part_of_an_answer():
    assert tidy(" $5.$ ") == "5"
    assert tidy("$18") == "$18"


@pytest.mark.parametrize(
    ("label", "answer", "equal"),
    [
        ("1000", "1,000", True),
        ("50", r"50\%", True),
        ("0.5", "50%", True),
        ("12.5", "12.5%", True),
        ("1/3", "0.333333", True),
        ("18", r"\$18", True),
        ("3", "3.0", True),
        ("-3", "−3", True),
        ("1000", "1e3", True),
        ("5", "-5", False),
        ("12345678901234567890", "12345678901234567891", False),
        ("1/3", "0.3333", False),
        ("1", "x", None),
        ("1", "1/0", None),
        ("1", "9" * 200, None),
        ("1", "1e999999999", None),
    ],
)
def test_plain_numbers_are_compared_and_others_left_to_the_library(label: str, answer: str, equal: bool | None):
    assert equal_numbers(label, answer) is equal
