"""Preference optimisation and reward models by the trainers of TRL.

peer/bin/python -m benchmarks.peers.trl_preference --method dpo --model MODEL --data pairs_256.jsonl --precompute

Each takes its data in file order; the batches of KTOTrainer are also those whose completions it mismatches.
"""

import argparse
import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from benchmarks.measure import Measure, arguments
from benchmarks.peers.settings import MeasureCallback, prepare, read_rows, training_arguments

PAIRED = ("prompt", "chosen", "rejected")
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, PAIRED),
    "cpo": (CPOTrainer, CPOConfig, PAIRED),
    "kto": (KTOTrainer, KTOConfig, ("prompt", "completion", "label")),
    "reward": (RewardTrainer, RewardConfig, PAIRED),
}
MASKS = ("attention_mask", "chosen_attention_mask", "rejected_attention_mask")
"""Which tokens of a batch the policy is trained on; CPO brings the two sides apart."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--method", choices=list(TRAINERS), required=True)
    parser.add_argument("--batch-size", type=int, default=4, help="pairs, or labelled completions, per step")
    parser.add_argument("--rank", type=int, default=0, help="of a LoRA adapter; 0 trains all weights")
    parser.add_argument("--precompute", action="store_true", help="the reference's logprobs before the clock starts")
    args = parser.parse_args()
    measure = Measure(warmup=args.warmup, steps=args.steps)
    trainer, configuration, columns = TRAINERS[args.method]

    class Trainer(trainer):
        def compute_loss(self, model, inputs, *rest, **options):
            masks = [inputs[name] for name in MASKS if name in inputs]
            measure.count(tokens=sum(m.sum().item() for m in masks), positions=sum(m.numel() for m in masks))
            return super().compute_loss(model, inputs, *rest, **options)

    config = configuration(
        **training_arguments(args),
        per_device_train_batch_size=args.batch_size,
        max_length=1024,
        train_sampling_strategy="sequential",
        **({"precompute_ref_log_probs": True} if args.precompute else {}),
    )
    rows = read_rows(args.data, *columns).select(range((args.warmup + args.steps) * args.batch_size))
    torch.manual_seed(0)  # an adapter begins as ours does
    adapter = {"peft_config": lora(args.rank)} if args.rank else {}
    callbacks = [MeasureCallback(measure)]
    Trainer(**models(args), args=config, train_dataset=rows, callbacks=callbacks, **adapter).train()
    measure.report(f"trl {args.method}", precision=args.precision, matmul=args.matmul)


def lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def models(args: argparse.Namespace) -> dict:
    """Model and tokenizer; a reward model has a score head, which the folder brings."""
    prepared = prepare(args)
    if args.method == "reward":
        prepared["model"] = AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=1, dtype=torch.float32, attn_implementation="sdpa"
        )
    return prepared


if __name__ == "__main__":
    main()
