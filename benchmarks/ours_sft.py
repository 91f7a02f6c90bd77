"""Supervised fine-tuning by whet.

python -m benchmarks.ours_sft --model MODEL --data sft.jsonl
"""

from benchmarks.measure import arguments
from benchmarks.ours import configuration, train


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--own-defaults", action="store_true", help="let whet choose the matrix precision")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    args = parser.parse_args()
    config = configuration(
        args,
        data={"train": args.data, "max_length": args.max_length, "shuffle": False},
        train={"steps": args.warmup + args.steps, "batch_size": args.batch_size},
    )
    train(config, args, "whet sft")


if __name__ == "__main__":
    main()
