"""Servers under test: started once, and asked by one engine after another."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from whet.config.engine import EngineConfig
from whet.engines.servers.dialect import Start
from whet.engines.servers.engine import Served, ServerEngine
from whet.engines.servers.process import Process, free_port
from whet.served import SERVERS
from whet.weights.snapshot import Snapshot

ROOT = Path(__file__).resolve().parent.parent


def vllm_python() -> str | None:
    """The Python of an environment that has vLLM, if there is one."""
    given = os.environ.get("WHET_VLLM_PYTHON")
    place = Path(given) if given else ROOT / ".venv-vllm" / "bin" / "python"
    return str(place) if place.is_file() else None


DOUBLE = ROOT / "tests" / "engines" / "sglang_double.py"


def double_python(folder: Path) -> str:
    """A Python in which `-m sglang.launch_server` is the stand-in."""
    script = folder / "python"
    packages = os.pathsep.join([str(ROOT / "src"), str(DOUBLE.parent)])
    lines = [
        "#!/bin/sh",
        f'if [ "$1" = "-m" ]; then shift 2; PYTHONPATH="{packages}" exec "{sys.executable}" "{DOUBLE}" "$@"; fi',
        f'exec "{sys.executable}" "$@"',
    ]
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    script.chmod(0o755)
    return str(script)


@dataclass(frozen=True)
class Place:
    """A server that runs, and the folder of the model that it began with."""

    kind: str
    address: str
    model: Path
    process: Process | None = None

    @classmethod
    @contextmanager
    def started(
        cls, kind: str, python: str, model: Path, logs: Path, *, bare: bool = False, **options: Any
    ) -> Iterator[Place]:
        """Start a server as the engine would; `bare` leaves whet's extension out."""
        dialect = SERVERS[kind][0]()
        config = EngineConfig(use=kind, python=python, max_concurrent=16, options=options)
        start = Start(str(model), "float32", 16, 0, "cpu")
        port = free_port()
        arguments = dialect.command(config, start, "127.0.0.1", port)
        environment = dict(dialect.environment(config, start))
        if bare:
            place = arguments.index("--worker-extension-cls")
            del arguments[place : place + 2]
            environment.pop("PYTHONPATH")
        process = Process(python, arguments, environment, logs / f"{kind}.log", kind)
        address = f"http://127.0.0.1:{port}"
        try:
            await_health(address, process)
            yield cls(kind, address, model, process)
        finally:
            process.end()


def await_health(address: str, process: Process | None, limit_s: float = 240.0) -> None:
    """Wait until a server answers."""
    limit = time.monotonic() + limit_s
    while True:
        assert process is None or process.ended is None, process.tail()
        try:
            if httpx2.get(f"{address}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        assert time.monotonic() < limit, f"{address} does not answer"
        time.sleep(0.2)


class Trainer:
    """A model that changes, and what servers are told of it: what the trainer's side of an engine is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def change(self, seed: int = 0, scale: float = 0.02, names: Callable[[str], bool] = lambda name: True) -> None:
        """Other weights, as after a step."""
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if names(name):
                    weight.add_(torch.randn(weight.shape, generator=draw) * scale)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, weight.detach()) for name, weight in self.model.named_parameters())

    def snapshot(self, version: int) -> Snapshot:
        return Snapshot(version, self.tensors)

    @torch.no_grad()
    def expected(self, tokens: Any, count: int) -> list[float]:
        """Logprobs of the last tokens, by the model's own forward."""
        logits = self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0, -count - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens[-count:])[:, None])[:, 0].tolist()

    def served(self, output: Path, **more: Any) -> Served:
        known = Served(
            model=str(self.folder),
            dtype="float32",
            vocabulary=len(self.tokenizer),
            num_bytes=2**20,
            stop_token_ids=(257,),
            max_positions=4096,
            tokenizer=self.tokenizer,
            output_dir=output,
            snapshot=self.snapshot,
            expected=self.expected,
        )
        return replace(known, **more)


def engine_of(kind: str, trainer: Trainer, output: Path, *, told: dict[str, Any] | None = None, **settings: Any) -> Any:
    """An engine on servers; settings are those of `EngineConfig`."""
    settings["publish"] = {"timeout_s": 60, **settings.get("publish", {})}
    config = EngineConfig(use=kind, **{"max_concurrent": 4, "timeout_s": 60, "health_interval_s": 0.5, **settings})
    dialect, remedy = SERVERS[kind]
    return ServerEngine(dialect(), config, trainer.served(output, **(told or {})), remedy)
