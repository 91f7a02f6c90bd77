"""Unit tests of a program as data sets write them: inputs and outputs, calls of a function, assertions."""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-6
_EXCERPT = 80
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
}


@dataclass(frozen=True)
class Case:
    """A whole program's input, and the output that it must have."""

    stdin: str
    expected: str

    def holds(self, output: str) -> bool:
        """Equal line by line, white space at the ends aside. Where a number with a decimal point is expected, one
        within 1e-6 of it (absolute or relative) will do."""
        wanted, given = _lines(self.expected), _lines(output)
        return len(wanted) == len(given) and all(map(_same_line, wanted, given))


@dataclass(frozen=True)
class Call:
    """What is evaluated beside the program in the sandbox, and the test of its value, which is done outside."""

    asked: Mapping[str, Any]
    test: Callable[[Any], Any]

    def holds(self, value: Any) -> bool:
        if isinstance(value, Exception):
            return False
        try:
            return bool(self.test(value))
        except (TypeError, ValueError, OverflowError):  # values that cannot be compared
            return False


@dataclass(frozen=True)
class UnitTests:
    """The tests of one program: cases, or calls."""

    cases: tuple[Case, ...] = ()
    calls: tuple[Call, ...] = ()

    def __len__(self) -> int:
        return len(self.cases) + len(self.calls)


def unit_tests(label: Any) -> UnitTests:
    """The tests that a label holds, which may be the text of the same as JSON.

    - `{inputs: [...], outputs: [...]}`: texts for standard input, and what the program must print.
    - with `fn_name`: lists of arguments (or texts of one JSON value per line), and what the function, or the method
      of a class Solution, must return. Tuples count as lists, floats within 1e-6.
    - a list of texts, or one text: Python that asserts. `assert value == 3` is evaluated in the sandbox up to the
      comparison, which is done outside; anything else passes by raising nothing.
    Raises ValueError for a label without tests.
    """
    if isinstance(label, str):
        label = _parsed(label)
    if isinstance(label, str):
        return UnitTests(calls=tuple(_assertions(label)))
    if isinstance(label, Mapping) and {"inputs", "outputs"} <= set(label):
        return _with_outputs(label)
    if isinstance(label, Sequence) and label and all(isinstance(one, str) for one in label):
        return UnitTests(calls=tuple(call for text in label for call in _assertions(text)))
    raise ValueError(
        f"the label is {label!r:.{_EXCERPT}}, expected unit tests: {{inputs, outputs}}, perhaps with fn_name, or a "
        "list of assertions"
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _with_outputs(tests: Mapping[str, Any]) -> UnitTests:
    inputs, outputs, name = tests["inputs"], tests["outputs"], tests.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise ValueError("the label's inputs and outputs must be lists of the same length, with something in them")
    if name is None:
        return UnitTests(
            cases=tuple(Case(_text(one), _text(other)) for one, other in zip(inputs, outputs, strict=True))
        )
    calls = (
        Call({"function": str(name), "arguments": _arguments(given)}, _returns(_value(expected)))
        for given, expected in zip(inputs, outputs, strict=True)
    )
    return UnitTests(calls=tuple(calls))


def _text(lines: Any) -> str:
    """Input or output of a program, which some data sets write as a list of lines."""
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)


def _arguments(given: Any) -> list[Any]:
    if isinstance(given, str):
        return [json.loads(line) for line in given.splitlines() if line.strip()]
    if not isinstance(given, list):
        raise ValueError(f"the arguments {given!r:.{_EXCERPT}} are no list")
    return given


def _value(expected: Any) -> Any:
    return _parsed(expected) if isinstance(expected, str) else expected


def _returns(expected: Any) -> Callable[[Any], bool]:
    return lambda value: _equal(expected, value)


def _equal(expected: Any, value: Any) -> bool:
    """Whether a value is what JSON says: keys are text there, tuples lists, and floats rounded."""
    if isinstance(expected, list):
        same_kind = isinstance(value, list | tuple) and len(value) == len(expected)
        return same_kind and all(map(_equal, expected, value))
    if isinstance(expected, dict):
        named = {str(key): item for key, item in value.items()} if isinstance(value, dict) else None
        return named is not None and set(named) == set(expected) and all(_equal(expected[k], named[k]) for k in named)
    if isinstance(expected, bool) or isinstance(value, bool):
        return expected is value
    if isinstance(expected, float) and isinstance(value, int | float):
        return math.isclose(expected, value, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return expected == value


def _assertions(text: str) -> list[Call]:
    """The tests of a text: its only assertion as a value and a test of it, else all of it as statements."""
    try:
        statements = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"the test {text!r:.{_EXCERPT}} is no Python: {error}") from error
    if not statements:
        raise ValueError(f"the test {text!r:.{_EXCERPT}} says nothing")
    if all(isinstance(one, ast.Assert) for one in statements):
        return [_assertion(one) for one in statements if isinstance(one, ast.Assert)]
    return [Call({"statements": text}, lambda value: value is True)]


def _assertion(statement: ast.Assert) -> Call:
    """An assertion as what is evaluated in the sandbox, and what must hold of it outside."""
    test = statement.test
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        compare = _COMPARISONS[type(test.ops[0])]
        left, right = test.left, test.comparators[0]
        for inside, outside, swapped in ((left, right, False), (right, left, True)):
            try:
                known = ast.literal_eval(outside)
            except ValueError:
                continue
            return Call({"expression": ast.unparse(inside)}, _compared(compare, known, swapped))
        if isinstance(test.ops[0], ast.Eq | ast.NotEq):  # both sides are computed: their values are compared outside
            pair = ast.unparse(ast.Tuple([left, right], ast.Load()))
            return Call({"expression": pair}, lambda values: compare(*values))
    return Call({"expression": f"not not ({ast.unparse(test)})"}, lambda value: value is True)


def _compared(compare: Callable[[Any, Any], Any], known: Any, swapped: bool) -> Callable[[Any], Any]:
    return lambda value: compare(known, value) if swapped else compare(value, known)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _same_line(wanted: str, given: str) -> bool:
    if wanted == given:
        return True
    pairs = wanted.split(), given.split()
    return len(pairs[0]) == len(pairs[1]) and all(map(_same_word, *pairs))


def _same_word(wanted: str, given: str) -> bool:
    if wanted == given:
        return True
    try:
        close = math.isclose(float(wanted), float(given), rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except ValueError:
        return False
    return close and not wanted.lstrip("+-").isdigit()
