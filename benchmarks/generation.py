"""Generation: whet's embedded engine against transformers' padded `generate`, on the same model and prompts.

python -m benchmarks.generation [--model FOLDER] [--repeats 5] [--contestants whet generate-64 …]

64 prompts of 16 to 64 tokens, each to be continued by 16 to 256 tokens; all lengths drawn once from a
fixed seed. The engine ends each completion at its own length; `generate` runs until the longest of its
batch has ended, and what it makes beyond a completion's length is not counted. Sampling at temperature 1
from the whole vocabulary on both sides; the engine returns logprobs as well. `generate-64` takes all
prompts in one batch, with sdpa and its own cache; `generate-32-sorted` and `generate-16-sorted` take batches
of like lengths, which nobody knows beforehand. Whole processes in turns, one thread, the same allocator
settings, CPU seconds after a warm-up, medians. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.pair import compare, table, take_turns

NUM_PROMPTS = 64
GOALS = {"generate-64": 2.0}
CONTESTANTS = ["whet", "generate-64", "generate-32-sorted", "generate-16-sorted"]
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None, "pad_token_id": 0}
Workload = list[tuple[list[int], int]]
"""Prompts, and how many tokens to sample after each."""


def workload(vocabulary: int, count: int = NUM_PROMPTS) -> Workload:
    rng = random.Random(0)

    def prompt() -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(rng.randint(16, 64))]

    return [(prompt(), rng.randint(16, 256)) for _ in range(count)]


def whet_engine(model) -> Callable[[Workload], int]:
    """A function that completes a workload by the embedded engine and returns the number of tokens."""
    from whet.engines.local.engine import LocalEngine
    from whet.types import Sampling

    engine = LocalEngine(model, max_concurrent=NUM_PROMPTS)

    async def complete(work: Workload) -> int:
        requests = (engine.generate(p, Sampling(max_tokens=n, seed=i)) for i, (p, n) in enumerate(work))
        return sum(len(completion.tokens) for completion in await asyncio.gather(*requests))

    return lambda work: asyncio.run(complete(work))


def transformers_generate(model, batch_size: int, by_length: bool) -> Callable[[Workload], int]:
    """The same by `generate`, prompts padded on the left, in batches; counts what was asked for."""
    import torch

    def batch(work: Workload) -> None:
        longest, steps = max(len(p) for p, _ in work), max(n for _, n in work)
        ids = torch.tensor([[0] * (longest - len(p)) + p for p, _ in work])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in work])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=steps, **SAMPLING)
        assert out.shape == (len(work), longest + steps), "generate stopped early"

    def complete(work: Workload) -> int:
        ordered = sorted(work, key=lambda pair: pair[1]) if by_length else work
        for start in range(0, len(ordered), batch_size):
            batch(ordered[start : start + batch_size])
        return sum(n for _, n in work)

    return complete


def contest(name: str, folder: str, dtype: str) -> dict:
    """One contestant in this process: load, warm up, measure; the report."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model.eval().generation_config.eos_token_id = None
    if name == "whet":
        complete = whet_engine(model)
    else:
        batch_size, *order = name.split("-")[1:]
        complete = transformers_generate(model, int(batch_size), bool(order))
    work = workload(model.config.vocab_size)
    complete([(prompt, 8) for prompt, _ in work])
    start = time.perf_counter(), time.process_time()
    tokens = complete(work)
    seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return {
        "name": name,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "tokens_per_cpu_s": round(tokens / cpu_seconds, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def make_model(folder: Path) -> Path:
    """Qwen3 of 5.2M parameters with random weights and a vocabulary of 8,192."""
    import transformers

    from whet.models.tiny import make_tiny

    transformers.logging.disable_progress_bar()
    shape = {"hidden_size": 256, "num_layers": 4, "head_dim": 64, "intermediate_size": 768}
    return make_tiny(folder, vocab_size=8192, **shape)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", help="folder of a transformers model; made from nothing when not given")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, help="whet comes first")
    parser.add_argument("--only", choices=CONTESTANTS, help="run one contestant in this process and print its report")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(contest(args.only, args.model, args.dtype)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or str(make_model(Path(scratch) / "model"))
        line = [sys.executable, "-m", "benchmarks.generation", "--model", model, "--dtype", args.dtype, "--only"]
        reports = take_turns({name: [*line, name] for name in args.contestants}, repeats=args.repeats)
    comparison = compare(reports, "tokens_per_cpu_s")
    title = f"generation, {NUM_PROMPTS} prompts, 16-256 tokens each, {args.dtype}"
    goals = {name: goal for name, goal in GOALS.items() if name in args.contestants}
    print(table(title, comparison, reports, goals))
    print(json.dumps({**comparison, "goals": goals, "dtype": args.dtype, "reports": reports}))


if __name__ == "__main__":
    main()
