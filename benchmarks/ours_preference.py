"""Preference optimisation and reward models by whet.

python -m benchmarks.ours_preference --method dpo --model MODEL --data pairs_256.jsonl --rank 16 --precompute
"""

from typing import Any

from benchmarks.measure import arguments
from benchmarks.ours import configuration, train


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--own-defaults", action="store_true", help="let whet choose the matrix precision")
    parser.add_argument("--method", choices=["dpo", "cpo", "kto", "reward"], required=True)
    parser.add_argument("--batch-size", type=int, default=4, help="pairs, or labelled completions, per step")
    parser.add_argument("--rank", type=int, default=0, help="of a LoRA adapter; 0 trains all weights")
    parser.add_argument("--precompute", action="store_true", help="the reference's logprobs before the clock starts")
    args = parser.parse_args()
    model: dict[str, Any] = {"path": args.model}
    if args.rank:
        model["adapter"] = {"rank": args.rank, "alpha": 2 * args.rank}
    num_steps = args.warmup + args.steps
    config = configuration(
        args,
        method=args.method,
        model=model,
        data={"train": f"{args.data}@[0:{num_steps * args.batch_size}]", "max_length": 1024, "shuffle": False},
        train={"steps": num_steps, "batch_size": args.batch_size},
        reference={"precompute": args.precompute},
    )
    train(config, args, f"whet {args.method}")


if __name__ == "__main__":
    main()
