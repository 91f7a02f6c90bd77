"""Preferences out of solutions that were judged: correct against incorrect ones of the same GSM8K question.

    python gsm8k_preferences.py gsm8k_model_solutions.jsonl [--output-dir .] [--max-pairs 4] [--held-out 0.2]

writes, each as _train.jsonl and _held_out.jsonl,

    gsm8k_preference   {"prompt": …, "chosen": …, "rejected": …}         for dpo and its relatives
    gsm8k_unpaired     {"prompt": …, "completion": …, "label": true}     for kto and bco
    gsm8k_reward       {"chosen": [messages], "rejected": [messages]}    for reward

A row of the input holds a `question` and solutions of several models, {"is_correct": …, "solution": …} under the name
of each. A question is in the training files or in the held-out ones, with all that was said to it. Pairs need a correct
and an incorrect solution; the unpaired files hold every solution once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solutions", type=Path, help="gsm8k_model_solutions.jsonl")
    parser.add_argument("--output-dir", type=Path, default=Path("."))
    parser.add_argument("--max-pairs", type=int, default=4, help="at most so many pairs of a question")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the questions that is held out")
    options = parser.parse_args()
    if options.max_pairs < 1 or not 0 <= options.held_out < 1:
        parser.error("--max-pairs must be at least 1, and --held-out at least 0 and less than 1")
    files: dict[str, list[Row]] = {
        f"gsm8k_{task}_{part}": [] for task in ("preference", "unpaired", "reward") for part in ("train", "held_out")
    }
    for question, correct, incorrect in judged(options.solutions):
        part = "held_out" if is_held_out(question, options.held_out) else "train"
        pairs = list(product(correct, incorrect))[: options.max_pairs]
        files[f"gsm8k_preference_{part}"] += [preference(question, *pair) for pair in pairs]
        files[f"gsm8k_reward_{part}"] += [reward(question, *pair) for pair in pairs]
        files[f"gsm8k_unpaired_{part}"] += [
            {"prompt": question, "completion": solution, "label": label}
            for solutions, label in ((correct, True), (incorrect, False))
            for solution in solutions
        ]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = options.output_dir / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows):,} rows")


def judged(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each question with its correct and its incorrect solutions, every one once, in their order."""
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            answers = [value for value in row.values() if isinstance(value, dict)]
            sides = ([a["solution"] for a in answers if a["is_correct"] == wanted] for wanted in (True, False))
            correct, incorrect = (list(dict.fromkeys(side)) for side in sides)
            yield row["question"], correct, incorrect


def is_held_out(question: str, share: float) -> bool:
    """By a hash of the question, so that it does not depend on the other rows."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def preference(question: str, chosen: str, rejected: str) -> Row:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def reward(question: str, chosen: str, rejected: str) -> Row:
    """Whole conversations, which begin alike with the question."""
    asked = {"role": "user", "content": question}
    sides = {"chosen": chosen, "rejected": rejected}
    return {side: [asked, {"role": "assistant", "content": text}] for side, text in sides.items()}


if __name__ == "__main__":
    main()
