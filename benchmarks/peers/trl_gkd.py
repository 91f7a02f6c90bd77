"""Distillation by TRL's GKDTrainer, generation by transformers.

peer/bin/python -m benchmarks.peers.trl_gkd --model MODEL --teacher TEACHER --data sft.jsonl --lmbda 1
"""

import json
import os
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDConfig, GKDTrainer

from benchmarks.measure import Measure, arguments
from benchmarks.peers.settings import MeasureCallback, prepare, training_arguments


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--teacher", required=True, help="folder of a transformers model")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lmbda", type=int, choices=[0, 1], default=0, help="1: the student samples the completions")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest sampled completion")
    args = parser.parse_args()
    measure = Measure(warmup=args.warmup, steps=args.steps)

    class Trainer(GKDTrainer):
        def compute_loss(self, model, inputs, *rest, **options):
            mask = inputs["attention_mask"]
            measure.count(tokens=mask.sum().item(), positions=mask.numel())
            return super().compute_loss(model, inputs, *rest, **options)

        def generate_on_policy_outputs(self, *inputs):
            with measure.sampling():
                return GKDTrainer.generate_on_policy_outputs(*inputs)

    config = GKDConfig(
        **training_arguments(args),
        per_device_train_batch_size=args.batch_size,
        max_length=1024,
        train_sampling_strategy="sequential",
        lmbda=args.lmbda,
        beta=0.5,
        temperature=1.0,  # of sampling alone: this trainer's loss knows none
        max_new_tokens=args.max_tokens,
    )
    prepared = prepare(args)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32, attn_implementation="sdpa")
    rows = Dataset.from_list(tokenised(args, prepared["processing_class"]))
    callbacks = [MeasureCallback(measure)]
    Trainer(**prepared, teacher_model=teacher, args=config, train_dataset=rows, callbacks=callbacks).train()
    measure.report(f"trl gkd, lmbda {args.lmbda}", precision=args.precision, matmul=args.matmul)


def tokenised(args, tokenizer) -> list[dict]:
    """Rows of prompt and completion as its collator takes them when they are no conversations."""
    lines = Path(args.data).read_text(encoding="utf-8").splitlines()[: (args.warmup + args.steps) * args.batch_size]
    rows = []
    for line in map(json.loads, lines):
        prompt = tokenizer(line["prompt"])["input_ids"]
        completion = [*tokenizer(line["completion"])["input_ids"], tokenizer.eos_token_id]
        mask = [0] * len(prompt) + [1] * len(completion)
        rows.append({"prompt": line["prompt"], "input_ids": prompt + completion, "completion_mask": mask})
    return rows


if __name__ == "__main__":
    main()
