"""Prompts out of GSM8K's own annotations: every `<<48/2=24>>` of its solutions becomes a question and its answer.

    python gsm8k_expressions.py gsm8k_train.jsonl gsm8k_test.jsonl [--output-dir .]

writes expressions_train.jsonl and expressions_held_out.jsonl, rows like
{"prompt": "48/2=", "label": "24", "response": "24"}: `response` is for fine-tuning, `label` for a reward.

Only what can be computed exactly is taken: 10/3=3.33 is left out. Each expression stands once, and none of the
held-out ones (all those of the test file) is among the training ones.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

ANNOTATION = re.compile(r"<<([^<>]*)>>")
NUMBER = re.compile(r"(?<![\d.])(?:\d+\.?\d*|\.\d+)(?![\d.])")
ALLOWED = re.compile(r"[-+*/().\d]+")
OPERATIONS = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__, ast.Mult: Fraction.__mul__}


class Skipped(ValueError):
    """An annotation that is no question with an exact answer; the text says why."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="gsm8k_train.jsonl")
    parser.add_argument("test", type=Path, help="gsm8k_test.jsonl")
    parser.add_argument("--output-dir", type=Path, default=Path("."))
    parser.add_argument("--largest", type=Fraction, help="leave out what holds or gives a larger number")
    options = parser.parse_args()
    held_out = read(options.test, taken=set(), largest=options.largest)
    train = read(options.train, taken=set(held_out), largest=options.largest)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, answers in (("train", train), ("held_out", held_out)):
        path = options.output_dir / f"expressions_{name}.jsonl"
        rows = ({"prompt": f"{asked}=", "label": answer, "response": answer} for asked, answer in answers.items())
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(answers):,} expressions")


def read(path: Path, taken: set[str], largest: Fraction | None = None) -> dict[str, str]:
    """Expression -> answer of one file, in its order, without those in `taken` and those with a number above
    `largest`; says what was skipped."""
    answers: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for annotation in annotations(path):
        counts["annotations"] += 1
        try:
            asked, answer = question(annotation)
        except Skipped as reason:
            counts[str(reason)] += 1
            continue
        if largest is not None and any(Fraction(number) > largest for number in NUMBER.findall(f"{asked}={answer}")):
            counts[f"with a number above {largest}"] += 1
        elif asked in taken:
            counts["in the held-out file"] += 1
        elif asked in answers:
            counts["seen before"] += 1
        else:
            answers[asked] = answer
    print(f"{path}: {', '.join(f'{count:,} {what}' for what, count in counts.items())}")
    return answers


def annotations(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield from ANNOTATION.findall(json.loads(line)["answer"])


def question(annotation: str) -> tuple[str, str]:
    """`.5*40=20.0` -> ("0.5*40", "20"). Raises Skipped."""
    asked, equals, answer = annotation.replace(" ", "").replace(",", "").partition("=")
    if not equals or not ALLOWED.fullmatch(asked) or not NUMBER.fullmatch(answer.removeprefix("-")):
        raise Skipped("malformed")
    asked = NUMBER.sub(lambda number: decimal(Fraction(number[0])), asked)
    try:
        tree = ast.parse(asked, mode="eval").body
        value = value_of(tree)
    except (SyntaxError, ZeroDivisionError) as error:
        raise Skipped("malformed") from error
    if not any(isinstance(node, ast.BinOp) for node in ast.walk(tree)):
        raise Skipped("without an operation")
    if value != Fraction(answer):
        raise Skipped("not exact")
    return asked, decimal(Fraction(answer))


def value_of(node: ast.expr) -> Fraction:
    """The value of an expression of numbers, + - * / and brackets. Raises Skipped for any other."""
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value_of(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return value_of(node.left) / value_of(node.right)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right))
    raise Skipped("malformed")


def decimal(value: Fraction) -> str:
    """A fraction as the shortest decimal: 1/2 as 0.5, 20 as 20. Only for those that have one."""
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    digits = f"{abs(value * 10**places).numerator:0{places + 1}d}"
    whole, part = (digits[:-places], "." + digits[-places:]) if places else (digits, "")
    return ("-" if value < 0 else "") + whole + part


if __name__ == "__main__":
    main()
