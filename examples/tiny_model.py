"""A small model made from nothing, to run the examples on a CPU without fetching anything.

    python tiny_model.py FOLDER [--corpus gsm8k_train.jsonl]

A Qwen3 of three layers with random weights. Its tokens are bytes; with a corpus they are learned from that text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from whet.models.tiny import make_tiny

LAYERS = {"num_layers": 3, "hidden_size": 128, "intermediate_size": 384}
HEADS = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", type=Path, help="a text to learn tokens from")
    parser.add_argument("--vocab-size", type=int, default=2048, help="how many tokens to learn (default 2048)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokens = {}
    if options.corpus:
        lines = options.corpus.read_text(encoding="utf-8").splitlines()
        tokens = {"tokenizer": "bpe", "corpus": lines, "vocab_size": options.vocab_size}
    print(make_tiny(options.folder, seed=options.seed, **LAYERS, **HEADS, **tokens))


if __name__ == "__main__":
    main()
