"""The examples run: every configuration for two steps, every script, on tiny models and a few rows."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from whet.compose import compose
from whet.config.loader import load
from whet.envs.retriever import Index, Server, read_corpus
from whet.log import METRICS_FILE
from whet.sample.run import compose_sampling
from whet.types import Episode, Prompt

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MOST_LINES = 100

SHORT = ["--train.steps", "2", "--data.cache_dir", "cache", "--log.progress", "false"]
SHORTER = {
    **{method: ["--train.batch_size", "4"] for method in ("sft", "dpo", "reward")},
    "gkd": ["--train.batch_size", "4", "--rollout.max_tokens", "4"],
    "grpo": [
        *("--rollout.prompts_per_step", "2", "--rollout.group_size", "3", "--rollout.max_tokens", "4"),
        *("--eval.max_prompts", "2"),
    ],
}

MODELS = (
    *("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "tiny", "tiny-calculator"),
    *("runs/expressions-sft", "runs/gsm8k-sft", "runs/calculator-sft"),
)
SOLUTIONS = [
    ("sold half as many", "She sold 48/2 = <<48/2=24>>24, so 48+24 = <<48+24=72>>72.\n#### 72"),
    ("per minute", "12/60 = $<<12/60=0.2>>0.2, then $<<.2*50=10.0>>10, and <<48/2=24>>24 again.\n#### 10"),
    ("left out", "A third is <<10/3=3.33>>3.33, <<5=5>>5, <<2x+1=7>>7, <<4/0=0>>0, <<2+=2>>2.\n#### 5"),
    ("large", "<<1,000*2=2,000>>2,000 and <<(2+3)*4-1=19>>19, <<3-10=-7>>-7.\n#### 19"),
]


@pytest.fixture
def folder(tmp_path: Path, tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the examples, with a tiny model under each name that they use and a few solutions as GSM8K."""
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", "cache"))
    for name in MODELS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tiny_qwen)
    rows = [{"question": f"{question} {i}?", "answer": answer} for i in range(4) for question, answer in SOLUTIONS]
    write_rows(tmp_path / "gsm8k_train.jsonl", rows)
    write_rows(tmp_path / "gsm8k_test.jsonl", rows[-1:])
    pairs = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "#### 0"} for row in rows]
    for name in ("preference_train", "preference_held_out", "reward_train", "reward_held_out"):
        write_rows(tmp_path / f"gsm8k_{name}.jsonl", pairs)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    precision = torch.get_float32_matmul_precision()
    yield tmp_path
    torch.set_float32_matmul_precision(precision)
    for name in ("own_reward", "gsm8k_reward"):
        sys.modules.pop(name, None)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(name, run_name="__main__")


@pytest.fixture
def expressions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script(monkeypatch, "gsm8k_expressions.py", "gsm8k_train.jsonl", "gsm8k_test.jsonl")
    return folder


@pytest.fixture
def calculator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    script(monkeypatch, "gsm8k_calculator.py", "gsm8k_train.jsonl", "gsm8k_test.jsonl")
    yield folder
    sys.modules.pop("gsm8k_expressions", None)


SAMPLES, SEARCHES = ("gsm8k-sample.yaml",), ("search-grpo.yaml",)
TRAINS = sorted({path.name for path in EXAMPLES.glob("*.yaml")} - {*SAMPLES, *SEARCHES})


@pytest.mark.parametrize("name", TRAINS)
async def test_configuration_trains_and_leaves_a_model(name: str, expressions: Path, calculator: Path):
    method = yaml.safe_load((expressions / name).read_text(encoding="utf-8")).get("method", "sft")
    config = load(method, name, [*SHORT, *SHORTER[method], "--output_dir", "runs/tried"]).config
    run = compose(config)
    metrics = await run.train()
    assert run.loop.finished and run.loop.global_step == 2
    assert ("eval/reward" if method == "grpo" else "eval/loss") in metrics
    assert {row["step"] for row in read_rows(Path("runs/tried") / METRICS_FILE)} >= {1, 2}
    adapter = config.model.adapter is not None
    assert (expressions / "runs/tried" / ("adapter_model.safetensors" if adapter else "model.safetensors")).is_file()


@pytest.mark.parametrize("name", SEARCHES)
async def test_configuration_searches(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "alpaca.json").write_text(json.dumps([{"instruction": "Name a fruit", "input": "", "output": "Apple"}]))
    script(monkeypatch, "search_corpus.py", "gsm8k_train.jsonl", "--beside", "alpaca.json")
    assert len(read_rows("search_corpus.jsonl")) == 17
    assert {row["label"] for row in read_rows("search_held_out.jsonl")} <= {"72", "10", "5", "19"}
    with Server(Index(read_corpus("search_corpus.jsonl")), port=0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        flags = [*SHORT, *SHORTER["grpo"], "--env.url", server.url, "--output_dir", "runs/tried"]
        metrics = await compose(load("grpo", name, flags).config).train()
        server.shutdown()
    assert "eval/env/num_searches" in metrics


def test_calculator_rows_show_some_worked_calls(calculator: Path):
    rows = read_rows("calculator_sft.jsonl")
    assert (
        len(rows) == len(read_rows("calculator_train.jsonl")) == 4 and len(read_rows("calculator_held_out.jsonl")) == 3
    )
    called = [row["messages"] for row in rows if len(row["messages"]) > 2]
    assert 0 < len(called) < 4
    assert all(messages[2]["content"] == messages[3]["content"] for messages in called)
    assert {row["tools"][0]["function"]["name"] for row in rows} == {"calculate"}


@pytest.mark.parametrize("name", SAMPLES)
async def test_configuration_samples_and_leaves_rows(name: str, folder: Path):
    short = ["--rollout.max_tokens", "4", "--sample.keep_truncated", "true", "--log.progress", "false"]
    report = await compose_sampling(load("sample", name, [*short, "--output_dir", "runs/tried"]).config).sample()
    rows = read_rows("runs/tried/rows.jsonl")
    assert report is not None and report["rows"] == len(rows) > report["prompts"]


def test_reward_of_gsm8k_asks_for_the_number_behind_the_mark(folder: Path):
    final = runpy.run_path("gsm8k_reward.py")["final"]

    def reward(response: str) -> float:
        return final(Episode(Prompt("p", [1], "?", "5+5 = 10\n#### 1,010"), "g", 0, response=response))["score"]

    assert reward("so\n#### 1010") == 1.0
    assert reward("#### 1,010 at first, then #### 7") == 0.1
    assert reward("it is 1010") == 0.0


def test_expressions_are_those_that_can_be_verified(expressions: Path, capsys: pytest.CaptureFixture):
    held_out = {row["prompt"]: row["label"] for row in read_rows("expressions_held_out.jsonl")}
    train = {row["prompt"]: row["label"] for row in read_rows("expressions_train.jsonl")}
    assert held_out == {"1000*2=": "2000", "(2+3)*4-1=": "19", "3-10=": "-7"}
    assert train == {"48/2=": "24", "48+24=": "72", "12/60=": "0.2", "0.2*50=": "10"}
    assert all(row["response"] == row["label"] for row in read_rows("expressions_train.jsonl"))


def test_every_annotation_is_accounted_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    script(monkeypatch, "gsm8k_expressions.py", "gsm8k_train.jsonl", "gsm8k_test.jsonl")
    # Four times 2 + 3 + 5 + 3 annotations. Of the first five kinds one each is taken: 4 new, 16 seen before. Each
    # solution that leaves out holds 1 inexact, 1 without operation, 3 malformed; each large one 3 held out.
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("gsm8k_train"))
    counts = {what: int(count) for count, what in (part.split(" ", 1) for part in line.partition(": ")[2].split(", "))}
    assert counts == {
        "annotations": 52,
        "seen before": 16,
        "not exact": 4,
        "without an operation": 4,
        "malformed": 12,
        "in the held-out file": 12,
    }


def test_expressions_of_the_real_file_are_exact(shared_data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    script(monkeypatch, "gsm8k_expressions.py", f"{shared_data}/gsm8k_train.jsonl", f"{shared_data}/gsm8k_test.jsonl")
    train, held_out = read_rows("expressions_train.jsonl"), read_rows("expressions_held_out.jsonl")
    assert len(train) > 8000 and len(held_out) > 2000
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    for row in held_out:  # in floating point, as another reader of the same text
        assert eval(row["prompt"].rstrip("=")) == pytest.approx(float(row["label"]), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name,rows", [("loop_by_hand", "sums.jsonl"), ("grpo_by_hand", "expressions_train.jsonl")])
def test_loop_by_hand_runs_and_saves_a_model(
    name: str, rows: str, expressions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    script(monkeypatch, f"{name}.py", "tiny", rows, "saved", "--steps", "2")
    assert "step 2: " in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained("saved") and AutoTokenizer.from_pretrained("saved")
    assert len(Path(f"{name}.py").read_text(encoding="utf-8").splitlines()) < MOST_LINES


async def test_grpo_by_hand_learns_what_is_rewarded(expressions: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    import grpo_by_hand  # lies in the folder that we stand in

    monkeypatch.setattr(grpo_by_hand, "reward", lambda answer, label: sum(letter in "0123456789" for letter in answer))
    monkeypatch.setattr(grpo_by_hand, "RATE", 1e-2)
    await grpo_by_hand.train("tiny", "expressions_train.jsonl", expressions / "saved", 8)
    rewards = [float(line.split("reward ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()]
    assert rewards[-1] > 3 * rewards[0]  # digits among eight tokens: 10 in 260 at first
    sys.modules.pop("grpo_by_hand")


async def test_own_reward_pays_for_the_number_and_for_brevity(folder: Path):
    from own_reward import brief

    async def parts(response: str) -> dict[str, float]:
        return await brief(Episode(Prompt("p", [1], "", label=42), "g", 0, response=response), most_characters=10)

    assert await parts("it is 42") == {"right": 1.0, "length": 0.0}
    assert await parts("it is 41") == {"right": 0.0, "length": 0.0}
    # Fifteen characters are half more than ten: half of a fifth.
    assert await parts("it is 42.000000") == {"right": 1.0, "length": pytest.approx(-0.1)}


@pytest.mark.parametrize("options", [[], ["--corpus", "sums.jsonl", "--vocab-size", "300"]], ids=["bytes", "learned"])
def test_tiny_model_is_a_whole_model(options: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch):
    script(monkeypatch, "tiny_model.py", "made", *options)
    tokenizer = AutoTokenizer.from_pretrained("made")
    tokens = tokenizer("What is 1 + 2?", return_tensors="pt")
    assert AutoModelForCausalLM.from_pretrained("made")(**tokens).logits.shape[-1] >= len(tokenizer)
    assert (tokens["input_ids"].numel() < 14) == bool(options)  # 14 bytes


def test_every_example_is_in_the_table_and_the_table_in_the_folder():
    named = re.findall(r"\]\(([\w.-]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml", ".jsonl")}
    assert files <= set(named)
    assert files >= set(named)
