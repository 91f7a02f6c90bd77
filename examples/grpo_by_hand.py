"""Reinforcement learning by hand: what `whet grpo` does, written out with the four primitives.

    python grpo_by_hand.py MODEL PROMPTS.jsonl OUTPUT [--steps 20]

Each prompt is answered several times over, each answer is judged, and what is better than its siblings gets likelier.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from whet.batch import collate
from whet.config.loader import from_values
from whet.credit import CREDITS
from whet.data.prompts import prepare_prompts
from whet.data.source import PromptRows
from whet.losses import create_loss
from whet.methods import Term
from whet.models.load import load_tokenizer
from whet.recipe import method_of
from whet.roles import load_policy
from whet.rollout.seeds import derive_seed
from whet.types import Completion, Prompt, Sample, Sampling, Unit

PROMPTS_PER_STEP = 16
GROUP_SIZE = 8
MAX_TOKENS = 8
RATE = 1e-4


def reward(answer: str, label: object) -> float:
    return float(answer.strip() == str(label))


def to_sample(prompt: Prompt, completion: Completion, answer: str) -> Sample:
    """Prompt and completion as one row, of which the completion is trained."""
    before = len(prompt.tokens)
    return Sample(
        tokens=[*prompt.tokens, *completion.tokens],
        loss_mask=[False] * before + [True] * len(completion.tokens),
        sampler_logprobs=[0.0] * before + list(completion.logprobs),
        reward=reward(answer, prompt.label),
    )


async def train(model: str, prompt_file: str, output: Path, steps: int) -> None:
    values = {"method": "grpo", "model": model, "data": {"train": prompt_file}, "reward": "exact"}
    config = from_values(values).config
    tokenizer = load_tokenizer(config.model)
    prompts = PromptRows(prepare_prompts(config.data, prompt_file, tokenizer), seed=config.seed)
    policy = load_policy(config, method_of(config), tokenizer, train=True)
    backend, engine = policy.backend, policy.engine()
    terms = [Term("ppo_clip", create_loss("ppo_clip"), weight="sequence")]

    async def group(prompt: Prompt, step: int) -> Unit:
        seeds = [derive_seed(config.seed, step, prompt.id, i) for i in range(GROUP_SIZE)]
        asked = [engine.generate(prompt.tokens, Sampling(MAX_TOKENS, seed=seed)) for seed in seeds]
        completions = await asyncio.gather(*asked)
        answers = [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
        return Unit(f"{step}/{prompt.id}", tuple(map(to_sample, [prompt] * GROUP_SIZE, completions, answers)))

    for step in range(steps):
        taken = await prompts.take(PROMPTS_PER_STEP)
        batch = collate(await asyncio.gather(*(group(prompt, step) for prompt in taken)))
        batch = CREDITS["grpo"](batch).weighed(["sequence", "token"])  # metrics are means over tokens
        metrics = backend.forward_backward(batch, terms)
        metrics |= backend.optim_step(lr=RATE)
        await engine.update_weights(step + 1)
        print(f"step {step + 1}: reward {batch['rewards'].mean():.3f}, entropy {metrics['entropy']:.3f}")

    await engine.close()
    output.mkdir(parents=True, exist_ok=True)
    backend.save(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    asyncio.run(train(options.model, options.prompts, options.output, options.steps))
