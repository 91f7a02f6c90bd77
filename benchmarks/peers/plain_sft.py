"""Supervised fine-tuning by transformers alone: padded rows, the model's own loss over all logits.

peer/bin/python -m benchmarks.peers.plain_sft --model MODEL --data sft.jsonl
"""

import itertools
import json
from pathlib import Path

import torch

from benchmarks.measure import Measure, arguments
from benchmarks.peers.settings import prepare


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    args = parser.parse_args()
    measure = Measure(warmup=args.warmup, steps=args.steps)
    model, tokenizer = prepare(args).values()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    lines = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines()]
    rows = itertools.cycle([encode(tokenizer, line, args.max_length) for line in lines])
    measure.begin()
    for _ in range(args.warmup + args.steps):
        batch = pad([next(rows) for _ in range(args.batch_size)], tokenizer.pad_token_id)
        measure.count(tokens=batch["attention_mask"].sum().item(), positions=batch["input_ids"].numel())
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        measure.losses.append(loss.item())
        measure.step_end()
    measure.report("transformers sft", precision=args.precision, matmul=args.matmul)


def encode(tokenizer, line: dict, max_length: int) -> tuple[list[int], list[int]]:
    """Tokens of one row, and the same with -100 where nothing is trained."""
    prompt = tokenizer(line["prompt"])["input_ids"]
    completion = [*tokenizer(line["completion"])["input_ids"], tokenizer.eos_token_id]
    return (prompt + completion)[:max_length], ([-100] * len(prompt) + completion)[:max_length]


def pad(rows: list[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows side by side, padded on the right to the longest."""
    width = max(len(tokens) for tokens, _ in rows)
    return {
        "input_ids": torch.tensor([tokens + [pad_token_id] * (width - len(tokens)) for tokens, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }


if __name__ == "__main__":
    main()
