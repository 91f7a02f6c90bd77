"""A corpus to search, and questions about it: worked problems of GSM8K among instructions and dialogues.

    python search_corpus.py gsm8k_train.jsonl [--beside alpaca_en_demo.json glaive_toolcall_en_demo.json]

writes search_corpus.jsonl for `python -m whet.envs.retriever`, and search_train.jsonl, search_held_out.jsonl: prompts
whose answer stands in one of the documents.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

NUM_HELD_OUT = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", type=Path, help="gsm8k_train.jsonl")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="files in Alpaca's or ShareGPT's form")
    parser.add_argument("--output-dir", type=Path, default=Path("."))
    options = parser.parse_args()
    problems = [json.loads(line) for line in options.problems.read_text(encoding="utf-8").splitlines()]
    documents = [{"title": row["question"], "text": row["answer"]} for row in problems]
    for path in options.beside:
        documents += map(document, json.loads(path.read_text(encoding="utf-8")))
    asked = list(questions(problems))
    most = min(NUM_HELD_OUT, len(asked) // 2)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", documents), ("train", asked[most:]), ("held_out", asked[:most])):
        path = options.output_dir / f"search_{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows):,} rows")


def document(row: dict) -> dict[str, str]:
    """An instruction with its answer, or a dialogue, as a document."""
    if "instruction" in row:
        return {"title": f"{row['instruction']} {row.get('input') or ''}".strip(), "text": row["output"]}
    first, *rest = (turn["value"] for turn in row["conversations"])
    return {"title": first, "text": "\n".join(rest)}


def questions(problems: list[dict]) -> Iterator[dict[str, str]]:
    """What the beginning of a problem leads to: its label is the number behind `####`."""
    for row in problems:
        yield {"prompt": row["question"], "label": row["answer"].rpartition("####")[2].strip().replace(",", "")}


if __name__ == "__main__":
    main()
