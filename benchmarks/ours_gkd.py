"""Distillation by whet, on the completions of the rows or on the student's own.

python -m benchmarks.ours_gkd --model MODEL --teacher TEACHER --data sft.jsonl --lmbda 1
"""

from benchmarks.measure import arguments
from benchmarks.ours import configuration, train


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--own-defaults", action="store_true", help="let whet choose the matrix precision")
    parser.add_argument("--teacher", required=True, help="folder of a transformers model")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lmbda", type=int, choices=[0, 1], default=0, help="1: the student samples the completions")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest sampled completion")
    args = parser.parse_args()
    num_steps = args.warmup + args.steps
    config = configuration(
        args,
        method="gkd",
        data={"train": f"{args.data}@[0:{num_steps * args.batch_size}]", "max_length": 1024, "shuffle": False},
        train={"steps": num_steps, "batch_size": args.batch_size},
        loss={"beta": 0.5, "temperature": 1.0},
        distill={"teacher": args.teacher, "lmbda": args.lmbda},
        rollout={"max_tokens": args.max_tokens, "temperature": 1.0},
    )
    train(config, args, f"whet gkd, lmbda {args.lmbda}")


if __name__ == "__main__":
    main()
