"""Supervised fine-tuning by TRL's SFTTrainer.

peer/bin/python -m benchmarks.peers.trl_sft --model MODEL --data sft.jsonl --mode padding_free
"""

from trl import SFTConfig, SFTTrainer

from benchmarks.measure import Measure, arguments
from benchmarks.peers.settings import MeasureCallback, prepare, read_rows, training_arguments


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mode", choices=["padded", "padding_free"], default="padded")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    args = parser.parse_args()
    measure = Measure(warmup=args.warmup, steps=args.steps)

    class Trainer(SFTTrainer):
        def compute_loss(self, model, inputs, *rest, **options):
            mask = inputs.get("attention_mask")
            computed = inputs["input_ids"].numel()
            measure.count(tokens=computed if mask is None else mask.sum().item(), positions=computed)
            return super().compute_loss(model, inputs, *rest, **options)

    free = args.mode == "padding_free"
    config = SFTConfig(
        **training_arguments(args),
        per_device_train_batch_size=args.batch_size,
        # TRL refuses max_length beside padding_free: the rows are short enough.
        max_length=None if free else args.max_length,
        padding_free=free,
        train_sampling_strategy="sequential",
    )
    rows = read_rows(args.data, "prompt", "completion")
    Trainer(**prepare(args), args=config, train_dataset=rows, callbacks=[MeasureCallback(measure)]).train()
    measure.report(f"trl sft {args.mode}", precision=args.precision, matmul=args.matmul)


if __name__ == "__main__":
    main()
