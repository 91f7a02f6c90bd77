"""Models and data of the benchmarks, made from nothing and always the same.

python -m benchmarks.assets FOLDER

| file | what |
|---|---|
| small/ | Qwen3 of 5.2M parameters, random weights, vocabulary 8,192 |
| wide/ | the same with a vocabulary of 151,936 and two layers |
| sft.jsonl | prompt and completion, together 32–1,024 tokens, log-normal |
| prompts.jsonl, prompts_256.jsonl | prompts of 16–64, and of 256 tokens |
| groups.jsonl | a prompt of 256 tokens with 8 completions of 64 and their rewards, as tokens |
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from transformers.utils.logging import disable_progress_bar

from whet.models.tiny import make_tiny

VOCABULARY = 8192
SHAPE = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "intermediate_size": 768}


class Text:
    """Text of invented words whose frequencies fall as those of a language do (Zipf)."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        onsets = ["b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "st", "tr", "pl"]
        syllables = [onset + vowel + coda for onset in onsets for vowel in "aeiou" for coda in ("", "n", "r", "s", "l")]
        words = {"".join(self.random.choices(syllables, k=self.random.randint(1, 4))) for _ in range(6000)}
        self._words = sorted(words)
        self.random.shuffle(self._words)
        self._cumulative = list(itertools.accumulate(1 / rank**1.05 for rank in range(1, len(self._words) + 1)))

    def words(self, count: int) -> str:
        total = self._cumulative[-1]
        picks = (bisect.bisect(self._cumulative, self.random.random() * total) for _ in range(count))
        return " ".join(self._words[pick] for pick in picks) + "."

    def tokens(self, tokenizer: Tokenizer, count: int) -> str:
        """Text of `count` tokens, give or take one where the cut does not fall between words."""
        return tokenizer.decode(tokenizer.encode(self.words(count)).ids[:count])


def make(folder: Path, num_rows: int = 256) -> Path:
    """Write everything into `folder`, unless it is there; return the folder."""
    complete = folder / "groups.jsonl"
    if complete.exists():
        return folder
    disable_progress_bar()
    text = Text(seed=0)
    corpus = [text.words(200) for _ in range(2000)]
    for name, num_layers, vocab_size in (("wide", 2, 151_936), ("small", 4, VOCABULARY)):
        make_tiny(folder / name, tokenizer="bpe", corpus=corpus, vocab_size=vocab_size, num_layers=num_layers, **SHAPE)
    tokenizer = Tokenizer.from_file(str(folder / "small" / "tokenizer.json"))
    write(folder / "sft.jsonl", (pair(text, tokenizer) for _ in range(num_rows)))
    for name, shortest, longest in (("prompts", 16, 64), ("prompts_256", 256, 256)):
        lengths = [text.random.randint(shortest, longest) for _ in range(num_rows)]
        write(folder / f"{name}.jsonl", ({"prompt": text.tokens(tokenizer, length)} for length in lengths))
    write(complete, (group(text.random) for _ in range(num_rows)))
    return folder


def pair(text: Text, tokenizer: Tokenizer) -> dict:
    """A prompt and its completion; a fifth to three fifths of the tokens are the prompt's."""
    length = min(1000, max(32, round(text.random.lognormvariate(5.3, 0.7))))
    cut = max(8, round(length * text.random.uniform(0.2, 0.6)))
    return {"prompt": text.tokens(tokenizer, cut), "completion": " " + text.tokens(tokenizer, max(8, length - cut))}


def group(rng: random.Random) -> dict:
    """One prompt, eight completions, eight different rewards. Special tokens, which stand last, are left out."""
    ids = range(VOCABULARY - 4)
    return {
        "prompt": rng.choices(ids, k=256),
        "completions": [rng.choices(ids, k=64) for _ in range(8)],
        "rewards": rng.sample([number / 8 for number in range(8)], k=8),
    }


def write(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object per line, whole or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scratch.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(make(parser.parse_args().folder))
