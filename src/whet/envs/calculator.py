"""The calculator: arithmetic written as text, computed exactly, with limits and without running code."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MOST_CHARACTERS = 200
MOST_DIGITS = 60
"""Digits of the numerator or denominator of any number on the way."""
DECIMALS = 6
WRITTEN = re.compile(r"[-+*/%().\d\s_eE]*")
USAGE = "is not arithmetic; use numbers, + - * / // % ** and brackets"
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """Computes an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % ** and brackets.
    """
    if not isinstance(expression, str):
        raise ValueError(f"the expression is {expression!r}, expected a text")
    if len(expression) > MOST_CHARACTERS:
        raise ValueError(f"the expression has {len(expression)} characters, more than {MOST_CHARACTERS}")
    if not WRITTEN.fullmatch(expression):  # Python's parser would also warn of some of the rest
        raise ValueError(f"{expression!r} {USAGE}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return decimal(_value(tree.body))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} is no arithmetic expression") from error
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error


def decimal(value: Fraction) -> str:
    """A fraction as a decimal of at most six places, without zeros at its end: 1/2 as 0.5, 20 as 20, 1/3 as 0.333333.

    Halves are rounded to even.
    """
    scaled = round(value * 10**DECIMALS)
    whole, part = divmod(abs(scaled), 10**DECIMALS)
    text = f"{whole}.{part:0{DECIMALS}d}".rstrip("0").rstrip(".")
    return f"-{text}" if scaled < 0 else text


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _limited(Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _power(_value(node.left), _value(node.right))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _limited(_BINARY[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError(f"{ast.unparse(node)[:40]!r} {USAGE}")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > 4 * MOST_DIGITS:
        raise ValueError(f"the exponent is {decimal(exponent)}, expected a whole number up to {4 * MOST_DIGITS}")
    digits = max(len(str(abs(base.numerator))), len(str(base.denominator)))
    if abs(base) != 1 and digits * abs(int(exponent)) > 4 * MOST_DIGITS:
        raise ValueError(f"the power has more than {MOST_DIGITS} digits")
    return _limited(base ** int(exponent))


def _limited(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MOST_DIGITS:
        raise ValueError(f"a number on the way has more than {MOST_DIGITS} digits")
    return value
