"""Supervised fine-tuning by hand: what `whet sft` does, written out with the four primitives.

    python loop_by_hand.py MODEL ROWS.jsonl OUTPUT [--steps 20]

forward_backward and optim_step train, generate samples, save writes a folder that transformers loads.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from whet.batch import collate
from whet.config.loader import from_values
from whet.data.prepare import prepare
from whet.data.source import RowSource
from whet.losses import create_loss
from whet.methods import Term
from whet.models.load import load_tokenizer
from whet.recipe import method_of
from whet.roles import load_policy
from whet.types import Sampling

BATCH_SIZE = 8
PEAK_RATE = 1e-3


async def train(model: str, rows: str, output: Path, steps: int) -> None:
    config = from_values({"model": model, "data": {"train": rows}}).config
    tokenizer = load_tokenizer(config.model)
    source = RowSource(prepare(config.data, rows, tokenizer), seed=config.seed)
    policy = load_policy(config, method_of(config), tokenizer, train=True)
    backend = policy.backend
    terms = [Term("sft", create_loss("sft"), weight="token")]

    for step in range(steps):
        batch = collate(await source.take(BATCH_SIZE), share_prefixes=backend.shares_prefixes)
        batch = batch.weighed(["token"])  # over the whole batch, before the backend cuts it into micro-batches
        metrics = backend.forward_backward(batch, terms)
        metrics |= backend.optim_step(lr=PEAK_RATE * (1 - step / steps))
        print(f"step {step + 1}: loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3f}")

    engine = policy.engine()  # over the same weights, so there is nothing to copy
    prompt = tokenizer.encode("What is 12 + 30?", add_special_tokens=False)
    completion = await engine.generate(prompt, Sampling(max_tokens=16, temperature=0.0))
    print("What is 12 + 30?", tokenizer.decode(completion.tokens, skip_special_tokens=True))
    await engine.close()

    output.mkdir(parents=True, exist_ok=True)
    backend.save(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    asyncio.run(train(options.model, options.rows, options.output, options.steps))
