"""Finding the answer in a text, and comparing answers that are plain numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

# Escaped braces are characters, not groups; a brace after a line break `\\` is a group.
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*{|(?<!\\)\\[{}]|[{}]")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus after a digit, a letter or a bracket is a subtraction: the last number of `16-3` is 3.
_NUMBER_IN_TEXT = re.compile(rf"(?:(?<![\w)\]}}])[-−])?(?:{_DIGITS})(?:/\d+(?![\d.]))?(?:\s?\\?%)?")
_PLAIN_NUMBER = re.compile(
    rf"(?P<sign>[-+−]?)\s*\\?\$?\s*(?P<digits>(?:{_DIGITS})|\d+\.)(?P<exponent>[eE][-+]?\d{{1,2}})?"
    rf"(?:/(?P<divisor>\d+))?\s*(?P<percent>\\?%)?"
)
_MOST_CHARACTERS = 100
# Decimals are compared as math-verify does, so that 0.333333 is one third.
_DECIMAL_PLACES = 6


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces are balanced, or None without one.

    Takes time linear in the text, however many boxes it leaves open.
    """
    open_braces: list[tuple[int, bool]] = []
    start, end = -1, -1
    for match in _BRACE.finditer(text):
        token = match.group()
        if token == "}" and open_braces:
            opened, is_box = open_braces.pop()
            if is_box and opened > start:
                start, end = opened, match.start()
        elif token.endswith("{") and token != "\\{":
            open_braces.append((match.end(), token != "{"))
    return text[start:end] if start >= 0 else None


def last_number(text: str) -> str | None:
    """The last number of a text, with its sign, thousands, decimals, `/divisor` and `%`, or None."""
    numbers = _NUMBER_IN_TEXT.findall(text)
    return numbers[-1] if numbers else None


def label_text(label: Any) -> str:
    r"""What a label says the answer is: a number as digits; of a text its last box, else what
    follows its last `####` (as in GSM8K), else all of it.

    Raises ValueError for a label that is missing, empty, or neither text nor number.
    """
    if isinstance(label, float | Decimal):
        text = format(Decimal(repr(label) if isinstance(label, float) else label), "f")
    elif isinstance(label, str | int) and not isinstance(label, bool):
        text = str(label)
        boxed = last_boxed(text)
        text = boxed if boxed is not None else text.rpartition("####")[2]
    else:
        raise ValueError(f"the label is {label!r}, expected a number or a text")
    text = tidy(text)
    if not text:
        raise ValueError(f"the label is {label!r}, which holds no answer")
    return text


def tidy(answer: str) -> str:
    """An answer without white space, dollar signs around it, and a full stop after it."""
    answer = answer.strip()
    if len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer.strip("$").strip()
    return answer.removesuffix(".").strip()


def equal_numbers(label: str, answer: str) -> bool | None:
    """Whether two plain numbers are equal, or None when one of them is something else.

    Whole numbers are compared exactly, others to six decimal places. `50%` is 50 and 0.5 alike.
    """
    pair = _plain_number(label), _plain_number(answer)
    if pair[0] is None or pair[1] is None:
        return None
    return any(_same(a, b) for a in _readings(*pair[0]) for b in _readings(*pair[1]))


def _plain_number(text: str) -> tuple[Fraction, bool] | None:
    """The value of a plain number and whether it is a percentage, or None if it is no plain number."""
    match = _PLAIN_NUMBER.fullmatch(text) if len(text) <= _MOST_CHARACTERS else None
    if match is None:
        return None
    divisor = int(match["divisor"] or 1)
    if divisor == 0:
        return None
    digits = match["digits"].replace(",", "")
    value = Fraction(digits + (match["exponent"] or "")) / divisor
    return (-value if match["sign"] in ("-", "−") else value), bool(match["percent"])


def _readings(value: Fraction, percent: bool) -> Iterator[Fraction]:
    yield value
    if percent:
        yield value / 100


def _same(a: Fraction, b: Fraction) -> bool:
    if a.denominator == b.denominator == 1:
        return a == b
    return a == b or round(a, _DECIMAL_PLACES) == round(b, _DECIMAL_PLACES)
