"""Unit tests are read as data sets write them, and judge values outside of the sandbox."""

from __future__ import annotations

import json

import pytest

from whet.rewards.sandbox.pool import ProgramError
from whet.rewards.unit_tests import Case, unit_tests


@pytest.mark.parametrize(
    ("expected", "output", "holds"),
    [
        ("1 2\n3", "1 2\n3\n", True),
        ("1 2\n3", "1 2  \n3\n\n", True),
        ("1 2\n3", "1 2 3", False),
        ("3", "3.0", False),
        ("3.0", "3", True),
        ("0.333333", "0.33333333", True),
        ("0.3333", "0.33", False),
        ("1e9", "1000000000", True),
        ("yes", "Yes", False),
        ("10000000", "10000001", False),
        ("nan", "1", False),
        ("", "\n", True),
        ("a b", "a", False),
    ],
)
def test_output_is_compared_line_by_line_and_decimals_within_a_tolerance(expected: str, output: str, holds: bool):
    assert Case("", expected).holds(output) is holds


def test_inputs_and_outputs_are_cases_of_a_whole_program():
    tests = unit_tests({"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", ["7"]]})
    assert tests.cases == (Case("1 2\n", "3\n"), Case("3\n4", "7")) and len(tests) == 2


@pytest.mark.parametrize(
    "label",
    [
        {"fn_name": "add", "inputs": [[1, [2]]], "outputs": [3]},
        {"fn_name": "add", "inputs": ["1\n[2]"], "outputs": ["3"]},
        json.dumps({"fn_name": "add", "inputs": [[1, [2]]], "outputs": [3]}),
    ],
)
def test_inputs_of_a_function_are_lists_of_arguments_or_json_line_by_line(label: object):
    (call,) = unit_tests(label).calls
    assert call.asked == {"function": "add", "arguments": [1, [2]]}
    assert call.holds(3) and not call.holds(4) and not call.holds(ProgramError("TypeError"))


@pytest.mark.parametrize(
    ("expected", "value", "holds"),
    [
        ([1, [2]], (1, (2,)), True),
        ([1, 2], [1, 2, 3], False),
        ({"1": 2}, {1: 2}, True),
        ({"1": 2}, {1: 3}, False),
        (0.5, 0.5000000001, True),
        (0.5, 0.51, False),
        (1, True, False),
        (True, True, True),
        (True, 1, False),
        ("5", 5, True),
        ('"five"', "five", True),
        ("five", "five", True),
        (None, None, True),
        (1, None, False),
    ],
)
def test_returned_values_are_compared_with_json(expected: object, value: object, holds: bool):
    (call,) = unit_tests({"fn_name": "f", "inputs": [[]], "outputs": [expected]}).calls
    assert call.holds(value) is holds


@pytest.mark.parametrize(
    ("test", "asked", "right", "wrong"),
    [
        ("assert f(1) == 2", "f(1)", 2, 3),
        ("assert 2 == f(1), 'message'", "f(1)", 2, 3),
        ("assert f(1) != 2", "f(1)", 3, 2),
        ("assert 3 < f(1)", "f(1)", 4, 3),
        ("assert abs(f(1) - 3) < 1e-6", "abs(f(1) - 3)", 0.0, 0.1),
        ("assert f(1) in (1, 2)", "f(1)", 1, 3),
        ("assert 1 in f(1)", "f(1)", [1], [2]),
        ("assert f(1) is None", "f(1)", None, 0),
        ("assert f(1)", "not not (f(1))", True, 1),
        ("assert not f(1)", "not not (not f(1))", True, False),
        ("assert f([1, 2]) == [-1, (2.5, 'x')]", "f([1, 2])", [-1, (2.5, "x")], [-1, [2.5, "x"]]),
        ("assert f(1) == g(2)", "(f(1), g(2))", (5, 5), (5, 6)),
        ("assert 1 < f(1) < 3", "not not (1 < f(1) < 3)", True, False),
    ],
)
def test_an_assertion_is_taken_apart_so_that_what_is_expected_stays_outside(
    test: str, asked: str, right: object, wrong: object
):
    (call,) = unit_tests([test]).calls
    assert call.asked == {"expression": asked}
    assert call.holds(right) and not call.holds(wrong)
    assert not call.holds(ProgramError("ZeroDivisionError"))


def test_other_tests_are_statements_that_must_raise_nothing():
    text = "for n in range(3):\n    assert f(n) == n\n"
    (call,) = unit_tests(text).calls
    assert call.asked == {"statements": text}
    assert call.holds(True) and not call.holds(1)


def test_several_assertions_in_one_text_are_several_tests():
    assert len(unit_tests("assert f(1) == 1\nassert f(2) == 4")) == 2
    assert len(unit_tests(json.dumps(["assert f(1) == 1", "assert f(2) == 4"]))) == 2


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (None, "None"),
        (5, "5"),
        ([], r"\[\]"),
        ("", "says nothing"),
        ("assert f(1) ==", "no Python"),
        ([1, 2], "expected unit tests"),
        ({"inputs": ["1"]}, "expected unit tests"),
        ({"inputs": ["1"], "outputs": []}, "same length"),
        ({"inputs": [], "outputs": []}, "something in them"),
        ({"inputs": "1", "outputs": "2"}, "must be lists"),
        ({"fn_name": "f", "inputs": [1], "outputs": [2]}, "no list"),
        ({"fn_name": "f", "inputs": ["x"], "outputs": [2]}, "Expecting value"),
    ],
)
def test_a_label_without_tests_is_refused(label: object, told: str):
    with pytest.raises(ValueError, match=told):
        unit_tests(label)
