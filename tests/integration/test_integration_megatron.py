"""The backend of Megatron-Core, in an environment of its own and over two processes, against the local backend.

It is that of WHET_MEGATRON_PYTHON, or else .venv-backends (`make integration` makes
it).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from whet.backends.device import Arithmetic
from whet.backends.local import LocalBackend
from whet.batch import Batch, collate
from whet.config.backend import BackendConfig
from whet.config.model import ModelConfig
from whet.config.optim import OptimConfig
from whet.credit import CREDITS
from whet.losses import LOSSES
from whet.methods import Term
from whet.models.load import load_tokenizer
from whet.models.tiny import make_tiny
from whet.types import Sample, Unit
from whet.weights.convert import convert

ROOT = Path(__file__).parent.parent.parent
PYTHON = Path(os.environ.get("WHET_MEGATRON_PYTHON") or ROOT / ".venv-backends" / "bin" / "python")
RANK = Path(__file__).parent / "megatron_rank.py"
LIMIT_S = 300
STEPS = 20
EXACT = Arithmetic(torch.device("cpu"), None, "highest")
OPTIM = {"lr": 3e-4, "weight_decay": 0.1, "max_grad_norm": 0.5}

pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(), reason=f"no environment with Megatron-Core: {PYTHON} is not there (make integration)"
)

FAMILIES = ("qwen3", "llama", "glm4", "qwen3_moe", "deepseek_v3")
SFT = [Term("sft", LOSSES["sft"], "token", options={"label_smoothing": 0.1})]
GRPO = [
    Term("ppo_clip", LOSSES["ppo_clip"], "sequence"),
    Term("kl", LOSSES["kl"], "sequence", coef=0.3),
    Term("entropy_bonus", LOSSES["entropy_bonus"], "token", coef=0.05),
]
DPO = [Term("sigmoid", LOSSES["sigmoid"], "pair", options={"beta": 0.5})]
METHODS = {"sft": SFT, "grpo": GRPO, "dpo": DPO}
LAYOUTS: dict[str, dict[str, Any]] = {
    "two data": {},
    "two tensor": {"tensor_parallel": 2},
    "two tensor, sequence": {"tensor_parallel": 2, "sequence_parallel": True},
    "two pipeline": {"pipeline_parallel": 2},
    "two context": {"context_parallel": 2},
    "two expert": {"expert_parallel": 2},
}


# --- models, batches and what the local backend makes of them -------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a four-layer model of a family; Qwen3's head is its embedding, and it has an odd vocabulary."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            tied = family == "qwen3"
            make_tiny(folder, family=family, num_layers=4, tie_embeddings=tied, vocab_size=261 if tied else 264)
            folders[family] = folder
        return folders[family]

    return make


def units(seed: int, pairs: bool = False) -> list[Unit]:
    """Units whose rows share prefixes, of uneven number and length, one of them without anything trained."""
    draw = random.Random(seed)

    def text(count: int) -> list[int]:
        return [draw.randrange(256) for _ in range(count)]

    def row(prompt: Sequence[int], count: int, label: float) -> Sample:
        tokens = [*prompt, *text(count)]
        mask = [False] * len(prompt) + [True] * count
        sampler = [draw.uniform(-2, 0) if trained else 0.0 for trained in mask]
        columns = {"labels": label} if pairs else {}
        return Sample(tokens, mask, sampler, draw.choice([0.0, 1.0]), columns)

    made = []
    for number in range(5):
        prompt = text(draw.randrange(3, 40))
        count = 2 if pairs else draw.randrange(2, 5)
        rows = tuple(row(prompt, draw.randrange(1, 30), float(i == 0)) for i in range(count))
        made.append(Unit(f"{seed}/{number}", rows))
    if not pairs:
        made.append(Unit(f"{seed}/nothing", (Sample(text(9), [False] * 9, [0.0] * 9, 0.0),)))
    return made


def batch_of(method: str, seed: int) -> Batch:
    batch = collate(units(seed, pairs=method == "dpo"))
    if method != "sft":
        reference = torch.where(batch.loss_mask, batch["sampler_logprobs"] * 0.9 - 4.6, 0)
        batch = batch.with_columns(ref_logprobs=reference)
    if method == "grpo":
        old = torch.where(batch.loss_mask, batch["sampler_logprobs"] * 0.3 - 5.2, 0)
        batch = CREDITS["grpo"](batch).with_columns(old_logprobs=old)
    return batch.weighed(["token", "sequence", "pair", "row"])


def local(folder: Path, **options: Any) -> LocalBackend:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    return LocalBackend(model, tokenizer, BackendConfig(), EXACT, optim=OptimConfig(**OPTIM), **options)


def trained(backend: LocalBackend, batches: Sequence[Batch], terms: Sequence[Term]) -> list[dict[str, float]]:
    """Metrics of each step; halfway the rate changes."""
    return [{**backend.forward_backward(batch, terms), **backend.optim_step(OPTIM["lr"])} for batch in batches]


# --- ranks ----------------------------------------------------------------------------------------------


def on_ranks(count: int, tasks: Sequence[dict[str, Any]], folder: Path) -> list[Any]:
    """What so many processes with Megatron answer to tasks, one after the other."""
    for number, task in enumerate(tasks):
        task["answer"] = str(folder / f"answer-{number}.json")
    (folder / "tasks.json").write_text(json.dumps(tasks))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    common |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(count):
        log = (folder / f"rank-{rank}.log").open("w")
        command = [str(PYTHON), str(RANK), str(folder / "tasks.json")]
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"rank-{rank}.log").read_text()[-4000:] for rank in range(count)]
    assert codes == [0] * count, "\n\n".join(logs)
    return [json.loads(Path(task["answer"]).read_text()) for task in tasks]


def saved(value: Any, path: Path) -> str:
    torch.save(value, path)
    return str(path)


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


# --- what each layout was asked, once -------------------------------------------------------------------

ASKED = ["logprobs", "entropy", "mean_logprobs", "correct", "log_sum_sq_probs"]


def families_of(layout: str) -> tuple[str, ...]:
    if layout == "two expert":
        return ("qwen3_moe", "deepseek_v3")
    return FAMILIES[:3] if layout == "two tensor" else FAMILIES  # experts want sequence parallelism as well


def trained_family(layout: str) -> str:
    return "qwen3_moe" if layout == "two expert" else "qwen3"


@pytest.fixture(scope="module")
def converted(models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's model as `whet convert` writes it for Megatron."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("converted") / family
            convert(models(family), folders[family], "megatron")
        return folders[family]

    return make


@pytest.fixture(scope="module")
def ran(models, converted, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """What two processes answer in a layout, by the name of the task, and the folder that they write to."""
    done: dict[str, tuple[dict[str, Any], Path]] = {}

    def run(layout: str) -> tuple[dict[str, Any], Path]:
        if layout not in done:
            folder = tmp_path_factory.mktemp("ranks")
            tasks = tasks_of(layout, models, converted, folder)
            answers = on_ranks(2, list(tasks.values()), folder)
            done[layout] = dict(zip(tasks, answers, strict=True)), folder
        return done[layout]

    return run


def tasks_of(layout: str, models, converted, folder: Path) -> dict[str, dict[str, Any]]:
    tasks: dict[str, dict[str, Any]] = {}
    batch = saved(batch_of("sft", 0), folder / "batch.pt")
    for family in families_of(layout):
        common = {"model": str(models(family)), "backend": LAYOUTS[layout]}
        export = str(folder / f"out-{family}")
        tasks[f"outputs {family}"] = {**common, "do": "outputs", "batch": batch, "outputs": ASKED, "export": export}
        tasks[f"stored {family}"] = {
            **common,
            "do": "stored",
            "load": str(converted(family) / "release"),
            "export": str(folder / f"stored-{family}"),
        }
    family = families_of(layout)[0]
    (folder / "written").mkdir()
    tasks["written"] = {**tasks[f"stored {family}"], "save": str(folder / "written"), "export": str(folder / "again")}
    backend = {**LAYOUTS[layout], "max_tokens_per_device": 128}
    for method, terms in METHODS.items():
        batches = [batch_of(method, seed) for seed in range(STEPS)]
        tasks[f"train {method}"] = {
            "do": "training",
            "model": str(models(trained_family(layout))),
            "backend": backend,
            "optim": OPTIM,
            "lr": OPTIM["lr"],
            "batches": saved((batches, terms), folder / f"{method}.pt"),
            "export": str(folder / f"trained-{method}"),
            **({"save_at": STEPS // 2, "save": str(folder / "checkpoint")} if method == "grpo" else {}),
        }
    return tasks


@pytest.fixture(scope="module")
def by_local(models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[list, dict[str, Tensor]]]:
    """Metrics of twenty steps of the local backend, and the weights that it ends with."""
    done: dict[tuple[str, str], tuple[list, dict[str, Tensor]]] = {}

    def run(method: str, family: str) -> tuple[list, dict[str, Tensor]]:
        if (method, family) not in done:
            backend = local(models(family))
            metrics = trained(backend, [batch_of(method, seed) for seed in range(STEPS)], METHODS[method])
            folder = tmp_path_factory.mktemp("local")
            backend.export_weights(folder)
            done[method, family] = metrics, weights_in(folder)
        return done[method, family]

    return run


# --- claims ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_back_bit_for_bit_and_outputs_are_those_of_transformers(layout: str, models, ran):
    """Every family, in this layout: HF -> Megatron -> HF, and logprobs, entropy and the like."""
    answers, folder = ran(layout)
    batch = batch_of("sft", 0)
    for family in families_of(layout):
        answer, source = answers[f"outputs {family}"], weights_in(models(family))
        exported = weights_in(folder / f"out-{family}")
        assert exported.keys() == source.keys() and all(torch.equal(exported[n], source[n]) for n in source), family
        assert AutoModelForCausalLM.from_pretrained(folder / f"out-{family}").config.model_type == family
        backend = local(models(family))
        expected = backend.forward(batch, set(ASKED))
        for name in ASKED:
            found = torch.tensor(answer["outputs"][name])
            assert (found.float() - expected[name].float()).abs().max() < 1e-5, (family, name)
        names = {name: list(weight.shape) for name, weight in backend.model.named_parameters()}
        assert answer["names"] == names, family


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_reads_what_convert_writes_and_convert_what_megatron_writes(layout: str, models, ran, tmp_path: Path):
    _, folder = ran(layout)
    for family in families_of(layout):
        source, loaded = weights_in(models(family)), weights_in(folder / f"stored-{family}")
        assert all(torch.equal(loaded[n], source[n]) for n in source), family
    family = families_of(layout)[0]
    shutil.copytree(models(family), folder / "written" / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    convert(folder / "written", tmp_path / "back", "hf")
    source, back = weights_in(models(family)), weights_in(tmp_path / "back")
    assert back.keys() == source.keys() and all(torch.equal(back[n], source[n]) for n in source)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_give_the_losses_and_weights_of_the_local_backend(layout: str, ran, by_local):
    """SFT, DPO and GRPO, small micro-batches, gradients clipped; with experts where they are divided."""
    answers, folder = ran(layout)
    for method in METHODS:
        expected, reached = by_local(method, trained_family(layout))
        check_metrics(answers[f"train {method}"]["metrics"], expected, method)
        assert difference(weights_in(folder / f"trained-{method}"), reached) < 1e-4, method


RESUMED = {
    "two data": "two tensor",
    "two pipeline": "two tensor",
    "two tensor, sequence": "two pipeline",
    "two context": "two data",
    "one": "two tensor",
}


@pytest.mark.parametrize("layout", RESUMED)
def test_a_run_goes_on_in_another_layout_as_if_nothing_had_happened(layout: str, models, ran, by_local, tmp_path: Path):
    _, before = ran(RESUMED[layout])
    task = {
        **tasks_of("two data", models, lambda family: tmp_path, tmp_path)["train grpo"],
        "backend": {**LAYOUTS.get(layout, {}), "max_tokens_per_device": 128},
        "resume": str(before / "checkpoint"),
        "begin_at": STEPS // 2,
    }
    del task["save_at"], task["save"]
    (answer,) = on_ranks(1 if layout == "one" else 2, [task], tmp_path)
    expected, reached = by_local("grpo", "qwen3")
    check_metrics(answer["metrics"], expected[STEPS // 2 :], layout)
    assert difference(weights_in(tmp_path / "trained-grpo"), reached) < 1e-4


def check_metrics(found: list[dict[str, float]], expected: list[dict[str, float]], what: str) -> None:
    assert len(found) == len(expected)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6), (what, step)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), (what, step)


def test_settings_that_megatron_or_the_model_refuse_are_named(models, tmp_path: Path):
    common = {"do": "refusal", "model": str(models("qwen3"))}
    cases = {
        "did you mean recompute_granularity?": {"options": {"recompute_granularty": "full"}},
        "is backend.tensor_parallel": {"options": {"tensor_model_parallel_size": 2}},
        "follows from the model, where it is 64": {"options": {"hidden_size": 128}},
        "needs transformer-engine or apex": {"options": {"use_distributed_optimizer": True}},
        "one run of layers": {"options": {"virtual_pipeline_model_parallel_size": 2}},
    }
    tasks = [{**common, "backend": backend} for backend in cases.values()]
    for said, answer in zip(cases, on_ranks(1, tasks, tmp_path), strict=True):
        assert said in answer["error"], answer


@pytest.mark.parametrize(
    "method,divided",
    [("sft", "pipeline_parallel"), ("grpo", "pipeline_parallel"), ("ppo", "tensor_parallel")],
)
def test_the_command_line_trains_on_two_processes(method: str, divided: str, models, tmp_path: Path):
    """From the configuration to a model that transformers load; PPO has a critic of its own."""
    data = [{"prompt": f"{a}+{a}=", "response": str(2 * a), "label": str(2 * a)} for a in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    sampled = {
        **{"reward.use": "exact", "rollout.prompts_per_step": 4, "rollout.max_tokens": 6},
        "rollout.group_size": 4 if method == "grpo" else 1,
    }
    settings = {
        **{"output_dir": tmp_path / "out", "model.path": models("qwen3"), "data.train": tmp_path / "rows.jsonl"},
        **{"data.cache_dir": tmp_path / "cache", "train.steps": 2, "log.tensorboard": "false", "log.progress": "false"},
        **{"backend.use": "megatron", f"backend.{divided}": 2, "cluster.num_processes": 2, "backend.threads": 1},
        **(sampled if method != "sft" else {"train.batch_size": 4}),
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    site = Path(__file__).parent / "megatron_site"
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT / 'src'}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(PYTHON), "-m", "whet", method, *flags], env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) >= 2
    before, after = weights_in(models("qwen3")), weights_in(tmp_path / "out")
    assert before.keys() == after.keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
