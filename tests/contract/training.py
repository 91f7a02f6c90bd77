"""The same training on any backend, in one process or on several ranks: what the contract of backends compares.

python -m tests.contract.training JOB RESULT        on every rank, with the environment of torchrun
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.awkward_units import awkward_units
from whet.backends.deepspeed import DeepSpeedBackend
from whet.backends.device import Arithmetic
from whet.backends.fsdp import FsdpBackend
from whet.backends.local import LocalBackend
from whet.batch import Batch, collate
from whet.config.backend import BackendConfig
from whet.config.model import ModelConfig
from whet.config.optim import OptimConfig
from whet.credit import CREDITS
from whet.losses import LOSSES
from whet.methods import Term
from whet.models.load import load_model, load_tokenizer
from whet.ranks.layout import Layout
from whet.ranks.share import shares
from whet.tally import Tally, weight_keys
from whet.types import Sample, Unit

BACKENDS = {"fsdp": FsdpBackend, "deepspeed": DeepSpeedBackend}
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 400

TERMS = {
    "sft": [Term("sft", LOSSES["sft"], "token", options={"label_smoothing": 0.1})],
    "dpo": [Term("sigmoid", LOSSES["sigmoid"], "pair"), Term("nll", LOSSES["nll"], "token", coef=0.2, on="chosen")],
    "grpo": [
        Term("ppo_clip", LOSSES["ppo_clip"], "sequence"),
        Term("kl", LOSSES["kl"], "sequence", coef=0.3),
        Term("entropy_bonus", LOSSES["entropy_bonus"], "token", coef=0.05),
    ],
    "reward": [Term("bradley_terry", LOSSES["bradley_terry"], "pair")],
    "values": [
        Term("ppo_clip", LOSSES["ppo_clip"], "sequence"),
        Term("value", LOSSES["value"], "token", coef=0.5),
    ],
}


@dataclass(frozen=True)
class Case:
    """One training: which model and method, with which settings of the backend, on which of the units."""

    model: str
    method: str = "sft"
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] | None = None
    weights: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the model: its type, its quantisation."""
    units: Sequence[int] | None = None
    steps: int = 20
    precision: str = "float32"
    save_to: str | None = None
    """A checkpoint is left there after half of the steps."""
    load_from: str | None = None
    """Training goes on from there, with the second half of the steps."""


def batch_of(case: Case, *, share_prefixes: bool) -> Batch:
    """The global batch of every step."""
    pairs = case.method in ("dpo", "reward")
    units = _pairs() if pairs else awkward_units()
    units = [units[i] for i in case.units] if case.units is not None else units
    batch = collate(units, share_prefixes=share_prefixes)
    wiggle = (batch.tokens * 7 + batch.position_ids * 3) % 11 / 40
    columns: dict[str, Tensor] = {"ref_logprobs": torch.where(batch.loss_mask, -5.4 - wiggle, 0)}
    if not pairs:
        batch = CREDITS["grpo"](batch)
        columns["old_logprobs"] = torch.where(batch.loss_mask, batch["sampler_logprobs"] * 0.3 - 5.2, 0)
        columns["returns"] = columns["values"] = torch.where(batch.loss_mask, wiggle, 0)
    return batch.with_columns(**columns).weighed(weight_keys(TERMS[case.method]))


def _pairs() -> list[Unit]:
    draw = torch.Generator().manual_seed(3)

    def text(count: int) -> list[int]:
        return torch.randint(256, (count,), generator=draw).tolist()

    units = []
    for i, (prompt, chosen, rejected) in enumerate([(30, 7, 9), (3, 20, 1), (25, 2, 15), (8, 5, 6), (1, 5, 5)]):
        trunk = text(prompt)
        rows = [
            Sample(trunk + answer, [False] * prompt + [True] * len(answer), columns={"labels": label})
            for label, answer in ((1.0, text(chosen)), (0.0, text(rejected)))
        ]
        units.append(Unit(str(i), tuple(rows)))
    return units


def make(case: Case, backend: str = "local") -> Any:
    """The backend of a case: `local`, or this rank's part of another."""
    config = BackendConfig(**{"timeout_s": 30.0, **case.settings})
    model = ModelConfig(path=case.model, adapter=case.adapter, **case.weights)  # pyright: ignore[reportArgumentType]
    tokenizer, scores = load_tokenizer(model), case.method == "reward"
    arithmetic = Arithmetic(torch.device("cpu"), torch.bfloat16 if case.precision == "bf16" else None, "highest")
    options = {"optim": OptimConfig(max_grad_norm=0.5), "values": case.method == "values"}
    torch.manual_seed(0)
    if backend == "local":
        loaded = load_model(model, arithmetic.device, scores=scores)
        return LocalBackend(loaded, tokenizer, config, arithmetic, **options)
    layout = Layout.of(config, dist.get_world_size())
    return BACKENDS[backend](model, tokenizer, config, arithmetic, layout=layout, scores=scores, **options)


def train(case: Case, backend: Any) -> dict[str, Any]:
    """Train as the case says, through the leader's view of a backend; returns what is to be compared."""
    batch = batch_of(case, share_prefixes=backend.shares_prefixes)
    terms = TERMS[case.method]
    outputs = {"scores"} if case.method == "reward" else {"logprobs", "entropy"}
    found: dict[str, Any] = {"outputs": backend.forward(batch, outputs), "losses": [], "norms": [], "metrics": []}
    steps = range(case.steps)
    if case.load_from is not None:
        backend.load(Path(case.load_from))
        steps = range(case.steps // 2, case.steps)
    for step in steps:
        if case.save_to is not None and step == case.steps // 2:
            backend.save(Path(case.save_to))
        metrics = backend.forward_backward(batch, terms)
        found["losses"].append(metrics["loss"])
        found["metrics"].append(metrics)
        found["norms"].append(backend.optim_step(3e-3)["grad_norm"])
        if step == 1:  # as around the sampling of an engine on the same device
            backend.offload()
            backend.onload()
    found["after"] = backend.forward(batch, outputs)
    found["weights"] = {name: weight.clone() for name, weight in backend.weights()}
    return found


class Together:
    """All ranks of this program, as one backend."""

    def __init__(self, own: Any, config: BackendConfig):
        self.own, self.config = own, config
        self.layout = Layout.of(config, dist.get_world_size())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def _each(self, method: str, batch: Batch, about: Any) -> list[tuple[list[int], Any]]:
        config = self.config
        costs = [tree.num_tokens for tree in batch.trees]
        most = config.max_tokens_per_device * self.layout.context
        divided = shares(batch, self.layout.data, costs, most, config.micro_batch_size)
        own, _ = getattr(self.own, method)(divided[self.layout.data_rank(dist.get_rank())][1], about)
        replies: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(replies, own)
        told = {self.layout.data_rank(r): reply for r, reply in enumerate(replies) if self.layout.reports(r)}
        return [(units, told[i]) for i, (units, _) in enumerate(divided)]

    def forward(self, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {}
        for units, found in self._each("forward", batch, outputs):
            sequences = torch.isin(batch.unit_ids, torch.tensor(units, dtype=torch.long))
            for name, values in found.items() if units else ():
                rows = sequences if name == "scores" else sequences[batch.sequence_ids]
                results.setdefault(name, values.new_zeros(len(rows), *values.shape[1:]))[rows] = values
        return results

    def forward_backward(self, batch: Batch, terms: Sequence[Term]) -> dict[str, float]:
        tally = Tally(terms)
        for _, state in self._each("forward_backward", batch, terms):
            tally.absorb(state)
        return tally.finish()


def on_ranks(backend: str, cases: Mapping[str, Case], ranks: int) -> dict[str, dict[str, Any]]:
    """Run the cases one after the other in one set of processes; what rank 0 found, by name."""
    with tempfile.TemporaryDirectory() as folder:
        job, result, log = (Path(folder) / name for name in ("job", "result", "log"))
        job.write_bytes(pickle.dumps((backend, dict(cases), ranks)))
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.contract.training", str(job), str(result)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the ranks as well
                process.wait()
        assert code == 0, f"the ranks ended with {code}:\n{log.read_text(errors='replace')[-8000:]}"
        return torch.load(result, weights_only=False)


def main() -> None:
    """Start the ranks as copies of this process, which has imported everything, and wait for them."""
    torch.set_num_threads(1)
    job, result = map(Path, sys.argv[1:3])
    backend, cases, ranks = pickle.loads(job.read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            os.environ["RANK"] = str(rank)
            code = 1
            try:
                run(backend, cases, result)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    for _ in children:
        _, status = os.wait()
        if status:  # the others would wait for it
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            sys.exit(1)


def run(backend: str, cases: Mapping[str, Case], result: Path) -> None:
    """Be one rank."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {}
    for name, case in cases.items():
        print("case", name, flush=True)
        own = make(case, backend)
        found[name] = train(case, Together(own, BackendConfig(**case.settings)))
    if dist.get_rank() == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
