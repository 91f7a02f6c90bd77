"""GRPO by TRL's GRPOTrainer, generation by transformers: the whole loop, or training on given completions.

peer/bin/python -m benchmarks.peers.trl_grpo --model MODEL --data prompts.jsonl --prompts-per-step 8
peer/bin/python -m benchmarks.peers.trl_grpo --model MODEL --data groups.jsonl --given
"""

import itertools
import json
import os
from pathlib import Path

from benchmarks.measure import Measure, arguments
from benchmarks.peers.settings import MeasureCallback, prepare, read_rows, training_arguments
from benchmarks.reward import vowel_share

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--given", action="store_true", help="the data holds the completions: nothing is generated")
    parser.add_argument("--prompts-per-step", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of every completion")
    parser.add_argument("--micro-batch-size", type=int, default=0, help="rows per forward; 0: all of the step")
    args = parser.parse_args()
    measure = Measure(warmup=args.warmup, steps=args.steps)

    class Trainer(GRPOTrainer):
        def _generate(self, prompts):
            with measure.sampling():
                return super()._generate(prompts)

        def compute_loss(self, model, inputs, *rest, **options):
            prompt, completion = inputs["prompt_mask"].sum().item(), inputs["completion_mask"].sum().item()
            measure.count(tokens=prompt + completion, completion_tokens=completion)
            return super().compute_loss(model, inputs, *rest, **options)

    rows_per_step = args.prompts_per_step * args.group_size
    micro_batch_size = args.micro_batch_size or rows_per_step
    config = GRPOConfig(
        **training_arguments(args),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=rows_per_step // micro_batch_size,
        num_generations=args.group_size,
        max_completion_length=args.max_tokens,
        # All completions are equally long, so that the work does not depend on what is sampled.
        generation_kwargs={"min_new_tokens": args.max_tokens},
        beta=0.0,
        shuffle_dataset=False,
    )
    source = given_completions(args) if args.given else generated_completions(args)
    Trainer(**prepare(args), args=config, callbacks=[MeasureCallback(measure)], **source).train()
    what = "step" if args.given else "loop"
    measure.report(f"trl grpo {what}", precision=args.precision, matmul=args.matmul)


def generated_completions(args) -> dict:
    """The policy samples, a rule rewards."""

    def reward(completions, **_):
        return [vowel_share(text) for text in completions]

    return {"train_dataset": read_rows(args.data, "prompt"), "reward_funcs": reward}


def given_completions(args) -> dict:
    """Tokens and rewards come from the file, one group per line."""
    lines = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines()]

    def rollout(prompts, _trainer):
        members = itertools.cycle(range(args.group_size))
        groups = [(lines[int(prompt)], member) for prompt, member in zip(prompts, members, strict=False)]
        return {
            "prompt_ids": [group["prompt"] for group, _ in groups],
            "completion_ids": [group["completions"][member] for group, member in groups],
            "logprobs": None,
        }

    def reward(prompts, **_):
        members = itertools.cycle(range(args.group_size))
        return [lines[int(prompt)]["rewards"][member] for prompt, member in zip(prompts, members, strict=False)]

    rows = Dataset.from_list([{"prompt": str(number)} for number in range(len(lines))])
    return {"train_dataset": rows, "reward_funcs": reward, "rollout_func": rollout}


if __name__ == "__main__":
    main()
