"""The training benchmarks: whet and its peers on the same model, rows and steps, in turns.

python -m benchmarks.run --peer FOLDER [CASE …] [--repeats 5]

FOLDER holds the environment that benchmarks/peer_env.sh makes. Prints, for every case, a table and one
JSON line with all reports. Cases: see CASES below, or `--help`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.assets import make
from benchmarks.pair import ENVIRONMENT, ROOT, compare, table, take_turns

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
OWN_DEFAULTS = "whet, own defaults"


@dataclass(frozen=True)
class Case:
    """One comparison. Arguments are those of all contestants; `peers` and `ours` add their own."""

    what: str
    ours: str
    peers: Mapping[str, str]
    arguments: str
    metric: str
    goals: Mapping[str, float]
    lower: bool = False
    own_defaults: bool = True
    environment: Mapping[str, str] = field(default_factory=lambda: ENVIRONMENT)


SFT_PEERS = {
    "trl padded": "trl_sft --mode padded",
    "trl padding_free": "trl_sft --mode padding_free",
    "transformers padded": "plain_sft",
}
# Memory is compared under the allocator's own settings: ours would keep what was freed.
PLAIN_ALLOCATOR = {name: value for name, value in ENVIRONMENT.items() if name not in ALLOCATOR}

MEMORY: dict[str, Any] = {"metric": "peak_mb", "lower": True, "environment": PLAIN_ALLOCATOR}


def preference(
    what: str,
    arguments: str,
    *,
    model: str = "small",
    steps: str = "--warmup 1 --steps 4",
    ours: str = "",
    peers: Mapping[str, str] | None = None,
    goals: Mapping[str, float] | None = None,
    metric: str = "tokens_per_cpu_s",
    lower: bool = False,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> Case:
    """Rows that hold a judgement. `ours` and `peers` add arguments, the peers' by name."""
    return Case(
        what=what,
        ours=f"ours_preference {ours}",
        peers={name: f"trl_preference {own}" for name, own in (peers or {"trl": ""}).items()},
        arguments=f"--model {{assets}}/{model} {arguments} {steps}",
        goals=goals or {"trl": 2.0},
        own_defaults=False,
        metric=metric,
        lower=lower,
        environment=environment,
    )


def distillation(
    what: str,
    lmbda: int,
    *,
    model: str = "small",
    teacher: str = "teacher",
    steps: str = "--warmup 1 --steps 4",
    metric: str = "tokens_per_cpu_s",
    lower: bool = False,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> Case:
    """The same rows, teacher and divergence; with `lmbda` 1 the student samples the completions."""
    rows = "--data {assets}/sft.jsonl"
    return Case(
        what=what,
        ours="ours_gkd",
        peers={"trl": "trl_gkd"},
        arguments=f"--model {{assets}}/{model} --teacher {{assets}}/{teacher} {rows} --lmbda {lmbda} {steps}",
        goals={"trl": 2.0},
        own_defaults=False,
        metric=metric,
        lower=lower,
        environment=environment,
    )


CASES = {
    "sft": Case(
        what="SFT, 5.2M parameters, 4 rows per step",
        ours="ours_sft",
        peers=SFT_PEERS,
        arguments="--model {assets}/small --data {assets}/sft.jsonl --warmup 2 --steps 8",
        metric="tokens_per_cpu_s",
        goals={"trl padded": 2.3, "trl padding_free": 1.7},
    ),
    "grpo-step": Case(
        what="GRPO, training alone: prompt of 256 tokens, 8 completions of 64",
        ours="ours_grpo --prompts {assets}/prompts.jsonl",
        peers={"trl": "trl_grpo"},
        arguments="--model {assets}/small --data {assets}/groups.jsonl --given --warmup 2 --steps 8",
        metric="tokens_per_cpu_s",
        goals={"trl": 4.0},
    ),
    "grpo-loop": Case(
        what="GRPO, the whole loop: 8 prompts of 256 tokens, 8 completions of 64 each",
        ours="ours_grpo",
        peers={"trl": "trl_grpo"},
        arguments="--model {assets}/small --data {assets}/prompts_256.jsonl --prompts-per-step 8 --warmup 1 --steps 2",
        metric="completion_tokens_per_cpu_s",
        goals={"trl": 4.0},
    ),
    "grpo-loop-short": Case(
        what="GRPO, the whole loop: 8 prompts of 16-64 tokens, 8 completions of 64 each",
        ours="ours_grpo",
        peers={"trl": "trl_grpo"},
        arguments="--model {assets}/small --data {assets}/prompts.jsonl --prompts-per-step 8 --warmup 1 --steps 3",
        metric="completion_tokens_per_cpu_s",
        goals={"trl": 4.0},
    ),
    "sft-memory": Case(
        what="SFT, peak memory with a vocabulary of 151,936, 8 rows per step",
        ours="ours_sft",
        peers=SFT_PEERS,
        arguments="--model {assets}/wide --data {assets}/sft.jsonl --batch-size 8 --warmup 1 --steps 1",
        metric="peak_mb",
        goals=dict.fromkeys(SFT_PEERS, 2.0),
        lower=True,
        own_defaults=False,
        environment=PLAIN_ALLOCATOR,
    ),
    "grpo-memory": Case(
        what="GRPO, peak memory of training with a vocabulary of 151,936: prompt of 256 tokens, 8 completions of 64",
        ours="ours_grpo --prompts {assets}/prompts.jsonl",
        peers={"trl": "trl_grpo"},
        arguments="--model {assets}/wide --data {assets}/groups.jsonl --given --warmup 1 --steps 1",
        metric="peak_mb",
        goals={"trl": 2.0},
        lower=True,
        own_defaults=False,
        environment=PLAIN_ALLOCATOR,
    ),
    "dpo": preference(
        "DPO, reference on line: 4 pairs per step, prompt of 256 tokens, 2 completions of 128",
        "--method dpo --data {assets}/pairs_256.jsonl",
        goals={"trl": 3.0},
    ),
    "dpo-precomputed": preference(
        "DPO, reference computed before: 4 pairs per step, prompt of 256 tokens, 2 completions of 128",
        "--method dpo --data {assets}/pairs_256.jsonl",
        ours="--precompute",
        peers={"trl precomputed": "--precompute", "trl on line": ""},
        goals={"trl precomputed": 1.8},
    ),
    "dpo-lora": preference(
        "DPO with LoRA of rank 16, reference on line: 4 pairs per step, prompt of 256 tokens, 2 completions of 128",
        "--method dpo --rank 16 --data {assets}/pairs_256.jsonl",
        goals={"trl": 3.0},
    ),
    "dpo-lora-precomputed": preference(
        "DPO with LoRA of rank 16, reference computed before: 4 pairs per step, prompt of 256 tokens, "
        "2 completions of 128",
        "--method dpo --rank 16 --data {assets}/pairs_256.jsonl",
        ours="--precompute",
        peers={"trl precomputed": "--precompute", "trl on line": ""},
        goals={"trl precomputed": 1.8},
    ),
    "reward": preference(
        "reward model: 4 pairs per step, prompts of 24-384 tokens, completions of 16-512",
        "--method reward --data {assets}/pairs.jsonl",
        model="scorer",
    ),
    "kto": preference(
        "KTO, reference on line: 8 rows per step, prompts of 24-384 tokens, completions of 16-512",
        "--method kto --data {assets}/labelled.jsonl --batch-size 8",
    ),
    "cpo": preference(
        "CPO with its NLL: 4 pairs per step, prompts of 24-384 tokens, completions of 16-512",
        "--method cpo --data {assets}/pairs.jsonl",
    ),
    "gkd": distillation("GKD on the rows' completions, teacher of 16.8M: 4 rows of 32-1,000 tokens per step", 0),
    "gkd-on-policy": distillation(
        "GKD on the student's completions, teacher of 16.8M: 4 ragged prompts per step, 64 sampled tokens each", 1
    ),
    "dpo-memory": preference(
        "DPO, peak memory with a vocabulary of 151,936, reference on line: 4 pairs of 256 and twice 128 tokens",
        "--method dpo --data {assets}/pairs_256.jsonl",
        model="wide",
        steps="--warmup 1 --steps 1",
        **MEMORY,
    ),
    "gkd-memory": distillation(
        "GKD, peak memory with a vocabulary of 151,936 on both sides: 2 rows of 32-1,000 tokens",
        0,
        model="wide",
        teacher="wide_teacher",
        steps="--batch-size 2 --warmup 1 --steps 1",
        **MEMORY,
    ),
}


def commands(case: Case, assets: Path, peer: Path) -> dict[str, list[str]]:
    """The contestants' command lines, ours first."""
    python = {"ours": sys.executable, "peer": str(peer / "bin" / "python")}

    def line(side: str, module: str, more: str = "") -> list[str]:
        return f"{python[side]} -m benchmarks.{module} {case.arguments} {more}".format(assets=assets).split()

    contestants = {"whet": line("ours", case.ours)}
    contestants |= {name: line("peer", f"peers.{module}") for name, module in case.peers.items()}
    if case.own_defaults:
        contestants[OWN_DEFAULTS] = line("ours", case.ours, "--own-defaults")
    return contestants


def play(case: Case, assets: Path, peer: Path, repeats: int) -> dict:
    """Run one case and print its table; everything that was measured."""
    reports = take_turns(commands(case, assets, peer), repeats=repeats, environment=case.environment)
    equal = {name: own for name, own in reports.items() if name != OWN_DEFAULTS}
    comparison = compare(equal, case.metric, lower=case.lower)
    print(table(case.what, comparison, equal, case.goals))
    result = {**comparison, "goals": dict(case.goals), "reports": reports}
    if case.own_defaults:
        better = {name: own for name, own in reports.items() if name != "whet"}
        own = compare({OWN_DEFAULTS: better.pop(OWN_DEFAULTS), **better}, case.metric, lower=case.lower)
        ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in own["ratios"].items())
        matmul = reports[OWN_DEFAULTS][0]["matmul"]
        print(f"  {OWN_DEFAULTS} (matmul {matmul}): {own['medians'][OWN_DEFAULTS]:,.1f}, that is {ratios}")
        result["own_defaults"] = own
    tokens = {name: own[0]["tokens"] for name, own in reports.items()}
    if len(set(tokens.values())) > 1:
        print(f"  not the same work, in tokens: {tokens}")
    sys.stdout.flush()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--peer", type=Path, required=True, help="environment made by benchmarks/peer_env.sh")
    parser.add_argument("--assets", type=Path, default=ROOT / "runs" / "benchmarks", help="models and data")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    assets, peer = make(args.assets.resolve()), args.peer.absolute()
    for name in args.cases or CASES:
        print(json.dumps({"case": name, **play(CASES[name], assets, peer, args.repeats)}), flush=True)


if __name__ == "__main__":
    main()
