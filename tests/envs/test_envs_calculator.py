"""The calculator computes exactly, refuses what is not arithmetic, and cannot be made to work for long."""

from __future__ import annotations

import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.envs.calculator import calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        *(("48/2", "24"), ("0.1+0.2", "0.3"), ("1/3", "0.333333"), ("-(2+3)*4", "-20"), ("2**10", "1024")),
        *(("7//2", "3"), ("-7 % 3", "2"), (" 5 ", "5"), ("2**-2", "0.25"), ("1e3", "1000"), ("1_000*2", "2000")),
        *(("0.0000004", "0"), ("-0.0000004", "0"), ("(-1)**7", "-1"), ("20.50", "20.5")),
    ],
)
def test_arithmetic_is_computed(expression: str, value: str):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("__import__('os').system('ls')", "not arithmetic"),
        ("x + 1", "not arithmetic"),
        ("e.e + 1", "not arithmetic"),
        ("2if 1else 3", "not arithmetic"),
        ("True + 1", "not arithmetic"),
        ("'a' * 9", "not arithmetic"),
        ("[1]", "not arithmetic"),
        ("1 if 1 else 2", "not arithmetic"),
        ("1j", "not arithmetic"),
        ("2 +", "no arithmetic expression"),
        ("1,000", "not arithmetic"),
        ("", "no arithmetic expression"),
        ("1/0", "division by zero"),
        ("0**-1", "division by zero"),
        ("5 % 0", "division by zero"),
        ("9**9**9", "exponent"),
        ("99**200", "digits"),
        ("2**0.5", "whole number"),
        ("1e99", "digits"),
        ("9" * 100, "digits"),
        ("1+" * 200 + "1", "more than 200"),
        ("(" * 150 + "1", "no arithmetic expression"),
        (5, "expected a text"),
    ],
)
def test_anything_else_says_what_is_wrong(expression: str, told: str):
    start = time.monotonic()
    with warnings.catch_warnings(), pytest.raises(ValueError, match=told):
        warnings.simplefilter("error")
        calculate(expression)
    assert time.monotonic() - start < 0.5


@given(st.text(alphabet="0123456789+-*/%().e ", max_size=30))
def test_no_text_makes_it_raise_anything_else(expression: str):
    try:
        value = calculate(expression)
    except ValueError:
        return
    assert float(value) is not None
