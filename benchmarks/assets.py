"""Models and data of the benchmarks, made from nothing and always the same.

python -m benchmarks.assets FOLDER

| file | what |
|---|---|
| small/ | Qwen3 of 5.2M parameters, random weights, vocabulary 8,192 |
| wide/ | the same with a vocabulary of 151,936 and two layers |
| sft.jsonl | prompt and completion, together 32–1,024 tokens, log-normal |
| prompts.jsonl, prompts_256.jsonl | prompts of 16–64, and of 256 tokens |
| groups.jsonl | a prompt of 256 tokens with 8 completions of 64 and their rewards, as tokens |
| scorer/ | small/ with a score head in place of the language-model head |
| teacher/, wide_teacher/ | Qwen3 of 16.8M parameters with the vocabulary of small/; wide/ with other weights |
| pairs_256.jsonl | a prompt of 256 tokens with two completions of 128 |
| pairs.jsonl | a prompt of 24–384 tokens with two completions of 16–512 each, log-normal |
| labelled.jsonl | the prompts of pairs.jsonl, each with one of its completions, in turns chosen and rejected |
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from whet.models.tiny import make_tiny

VOCABULARY = 8192
SHAPE = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "intermediate_size": 768}
TEACHER = {"hidden_size": 512, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "intermediate_size": 1536}


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
    complete = folder / "labelled.jsonl"
    if complete.exists():
        return folder
    disable_progress_bar()
    set_verbosity_error()  # or it reports the score head, which is new
    text = Text(seed=0)
    corpus = [text.words(200) for _ in range(2000)]
    make_models(folder, corpus)
    tokenizer = Tokenizer.from_file(str(folder / "small" / "tokenizer.json"))
    write(folder / "sft.jsonl", (pair(text, tokenizer) for _ in range(num_rows)))
    for name, shortest, longest in (("prompts", 16, 64), ("prompts_256", 256, 256)):
        counts = [text.random.randint(shortest, longest) for _ in range(num_rows)]
        write(folder / f"{name}.jsonl", ({"prompt": text.tokens(tokenizer, count)} for count in counts))
    write(folder / "groups.jsonl", (group(text.random) for _ in range(num_rows)))
    write(folder / "pairs_256.jsonl", (judged(text, tokenizer, 256, 128, 128) for _ in range(num_rows)))
    ragged = [judged(text, tokenizer, *lengths(text.random)) for _ in range(num_rows)]
    write(folder / "pairs.jsonl", ragged)
    write(complete, (side(row, chosen=number % 2 == 0) for number, row in enumerate(ragged)))
    return folder


def make_models(folder: Path, corpus: list[str]) -> None:
    """The models, which have all the same tokenizer if they have the same vocabulary."""
    wide = {"vocab_size": 151_936, "num_layers": 2, **SHAPE}
    narrow = {"vocab_size": VOCABULARY, "num_layers": 4}
    kinds: dict[str, dict[str, Any]] = {
        "wide": wide,
        "wide_teacher": {**wide, "seed": 1},
        "small": {**narrow, **SHAPE},
        "teacher": {**narrow, **TEACHER},
    }
    for name, shape in kinds.items():
        make_tiny(folder / name, tokenizer="bpe", corpus=corpus, **shape)
    torch.manual_seed(0)
    scorer = AutoModelForSequenceClassification.from_pretrained(folder / "small", num_labels=1, dtype=torch.float32)
    scorer.save_pretrained(folder / "scorer")
    AutoTokenizer.from_pretrained(folder / "small").save_pretrained(folder / "scorer")


def pair(text: Text, tokenizer: Tokenizer) -> dict:
    """A prompt and its completion; a fifth to three fifths of the tokens are the prompt's."""
    length = min(1000, max(32, round(text.random.lognormvariate(5.3, 0.7))))
    cut = max(8, round(length * text.random.uniform(0.2, 0.6)))
    return {"prompt": text.tokens(tokenizer, cut), "completion": " " + text.tokens(tokenizer, max(8, length - cut))}


def judged(text: Text, tokenizer: Tokenizer, prompt: int, chosen: int, rejected: int) -> dict:
    """A prompt and two completions of so many tokens, their end included."""
    sides = {"chosen": " " + text.tokens(tokenizer, chosen - 1), "rejected": " " + text.tokens(tokenizer, rejected - 1)}
    return {"prompt": text.tokens(tokenizer, prompt), **sides}


def lengths(rng: random.Random) -> tuple[int, int, int]:
    """Tokens of a prompt and of two completions, half of them below 128."""
    prompt, chosen, rejected = (round(rng.lognormvariate(4.85, 0.7)) for _ in range(3))
    return min(384, max(24, prompt)), min(512, max(16, chosen)), min(512, max(16, rejected))


def side(row: dict, *, chosen: bool) -> dict:
    """One completion of a pair, as a row of its own with its label."""
    return {"prompt": row["prompt"], "completion": row["chosen" if chosen else "rejected"], "label": chosen}


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
