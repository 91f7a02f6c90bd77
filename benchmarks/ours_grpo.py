"""GRPO by whet, generation by its local engine: the whole loop, or training on given completions.

python -m benchmarks.ours_grpo --model MODEL --data prompts.jsonl --prompts-per-step 8
python -m benchmarks.ours_grpo --model MODEL --data groups.jsonl --prompts prompts.jsonl --given
"""

import itertools
import json
from pathlib import Path

from benchmarks.measure import arguments
from benchmarks.ours import configuration, train
from whet.types import Sample, Unit


class GivenGroups:
    """A source whose groups come from a file, again and again."""

    def __init__(self, path: str) -> None:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        self._groups = itertools.cycle(map(to_unit, map(json.loads, lines), itertools.count()))

    async def take(self, n: int) -> list[Unit]:
        return list(itertools.islice(self._groups, n))

    async def publish(self, snapshot: object) -> None:
        """Nothing samples from the weights."""


def to_unit(group: dict, number: int) -> Unit:
    """One line of groups.jsonl as a scored group."""
    prompt = group["prompt"]
    samples = [
        Sample(
            tokens=prompt + completion,
            loss_mask=[False] * len(prompt) + [True] * len(completion),
            reward=reward,
        )
        for completion, reward in zip(group["completions"], group["rewards"], strict=True)
    ]
    return Unit(f"g{number}", tuple(samples))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--own-defaults", action="store_true", help="let whet choose the matrix precision")
    parser.add_argument("--given", action="store_true", help="the data holds the completions: nothing is generated")
    parser.add_argument("--prompts", help="with --given: any file of prompts, which are not used")
    parser.add_argument("--prompts-per-step", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64, help="longest completion")
    args = parser.parse_args()
    config = configuration(
        args,
        method="grpo",
        data={"train": args.prompts if args.given else args.data, "shuffle": False},
        train={"steps": args.warmup + args.steps},
        rollout={
            "prompts_per_step": args.prompts_per_step,
            "group_size": args.group_size,
            "max_tokens": args.max_tokens,
        },
        reward={"use": "benchmarks.reward:reward"},
    )
    source = GivenGroups(args.data) if args.given else None
    train(config, args, f"whet grpo {'step' if args.given else 'loop'}", source=source)


if __name__ == "__main__":
    main()
