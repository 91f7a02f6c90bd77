"""A calculator to learn with: questions and worked calls out of GSM8K's annotations (`<<48/2=24>>`).

    python gsm8k_calculator.py gsm8k_train.jsonl gsm8k_test.jsonl [--output-dir .] [--calls 0.3]

writes calculator_sft.jsonl, conversations to begin with: some of them call the calculator, the others answer at once;
and calculator_train.jsonl, questions with labels for reinforcement learning; of both also a part that is held out.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from gsm8k_expressions import read

from whet.envs.calculator import calculate
from whet.envs.tools import schemas

TOOLS = schemas(["calculator"])
LARGEST = Fraction(10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="gsm8k_train.jsonl")
    parser.add_argument("test", type=Path, help="gsm8k_test.jsonl")
    parser.add_argument("--output-dir", type=Path, default=Path("."))
    parser.add_argument("--calls", type=float, default=0.3, help="share of the worked answers that use the calculator")
    options = parser.parse_args()
    held_out = read(options.test, taken=set(), largest=LARGEST)
    train = read(options.train, taken=set(held_out), largest=LARGEST)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    files = {
        **{"sft": worked(train, options.calls), "sft_held_out": worked(held_out, options.calls)},
        **{"train": questions(train), "held_out": questions(held_out)},
    }
    for name, rows in files.items():
        path = options.output_dir / f"calculator_{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(path)


def questions(answers: dict[str, str]) -> Iterator[dict]:
    for asked, answer in answers.items():
        yield {"prompt": [{"role": "user", "content": asked}], "label": answer}


def worked(answers: dict[str, str], share: float) -> Iterator[dict]:
    """Each question with its answer, `share` of them by way of the calculator."""
    draw = random.Random(0)
    for asked, answer in answers.items():
        messages = [{"role": "user", "content": asked}]
        if draw.random() < share:
            call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": asked}}}
            messages += [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": calculate(asked)},
            ]
        yield {"messages": [*messages, {"role": "assistant", "content": answer}], "tools": TOOLS}


if __name__ == "__main__":
    main()
