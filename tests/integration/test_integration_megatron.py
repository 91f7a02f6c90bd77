"""The backend of Megatron-Core, in an environment of its own and over two processes, against the local backend.

It is the first of WHET_MEGATRON_PYTHON and .venv-megatron/bin/python that there is (`scripts/megatron_env.sh` makes it).
"""

from __future__ import annotations

import json
import os
import random
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

ROOT = Path(__file__).parent.parent.parent
PYTHON = Path(os.environ.get("WHET_MEGATRON_PYTHON") or ROOT / ".venv-megatron" / "bin" / "python")
RANK = Path(__file__).parent / "megatron_rank.py"
LIMIT_S = 300
STEPS = 20
EXACT = Arithmetic(torch.device("cpu"), None, "highest")
OPTIM = {"lr": 3e-4, "weight_decay": 0.1, "max_grad_norm": 0.5}

pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(), reason=f"no environment with Megatron-Core: {PYTHON} is not there (scripts/megatron_env.sh)"
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


# --- claims ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_back_bit_for_bit_and_outputs_are_those_of_transformers(layout: str, models, tmp_path: Path):
    """Every family, in this layout: HF -> Megatron -> HF, and logprobs, entropy and the like."""
    families = [f for f in FAMILIES if layout != "two expert" or f in ("qwen3_moe", "deepseek_v3")]
    if layout == "two tensor":
        families = families[:3]  # experts want sequence parallelism as well
    asked = ["logprobs", "entropy", "mean_logprobs", "correct", "log_sum_sq_probs"]
    batch = batch_of("sft", 0)
    common = {"do": "outputs", "backend": LAYOUTS[layout], "batch": saved(batch, tmp_path / "batch.pt")}
    tasks = [{**common, "model": str(models(f)), "export": str(tmp_path / f), "outputs": asked} for f in families]
    answers = on_ranks(2, tasks, tmp_path)
    for family, answer in zip(families, answers, strict=True):
        source = weights_in(models(family))
        exported = weights_in(tmp_path / family)
        assert exported.keys() == source.keys() and all(torch.equal(exported[n], source[n]) for n in source), family
        assert AutoModelForCausalLM.from_pretrained(tmp_path / family).config.model_type == family
        backend = local(models(family))
        expected = backend.forward(batch, set(asked))
        for name in asked:
            found = torch.tensor(answer["outputs"][name])
            assert (found.float() - expected[name].float()).abs().max() < 1e-5, (family, name)
        names = {name: list(weight.shape) for name, weight in backend.model.named_parameters()}
        assert answer["names"] == names, family


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_give_the_losses_and_weights_of_the_local_backend(layout: str, models, tmp_path: Path):
    """SFT, DPO and GRPO, small micro-batches, gradients clipped; with experts where they are divided."""
    family = "qwen3_moe" if layout == "two expert" else "qwen3"
    backend = {**LAYOUTS[layout], "max_tokens_per_device": 128}
    tasks, expected, reached = [], [], []
    for method, terms in METHODS.items():
        batches = [batch_of(method, seed) for seed in range(STEPS)]
        ours = local(models(family))
        expected.append(trained(ours, batches, terms))
        ours.export_weights(tmp_path / f"local-{method}")
        reached.append(weights_in(tmp_path / f"local-{method}"))
        tasks.append(
            {
                "do": "training",
                "model": str(models(family)),
                "backend": backend,
                "optim": OPTIM,
                "lr": OPTIM["lr"],
                "batches": saved((batches, terms), tmp_path / f"{method}.pt"),
                "export": str(tmp_path / f"megatron-{method}"),
            }
        )
    answers = on_ranks(2, tasks, tmp_path)
    for method, answer, metrics, weights in zip(METHODS, answers, expected, reached, strict=True):
        for step, (found, wanted) in enumerate(zip(answer["metrics"], metrics, strict=True)):
            assert found.keys() == wanted.keys()
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5), (method, step)
            assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4), (method, step)
        moved = difference(weights_in(tmp_path / f"megatron-{method}"), weights)
        assert moved < 1e-4, (method, moved)
