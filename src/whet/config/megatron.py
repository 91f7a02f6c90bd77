"""What the backend megatron cannot do, as far as it can be known from settings alone."""

from __future__ import annotations

from collections.abc import Iterator

from whet.config.model import FreezeConfig
from whet.config.names import show
from whet.config.problems import Problem
from whet.config.run import RunConfig

WHOLE_DISTRIBUTIONS = ("gkd", "distill")
"""Methods that compare the probabilities of all words."""


def megatron_problems(config: RunConfig) -> Iterator[Problem]:
    """What a run asks of Megatron-Core that it has not."""
    if config.backend.use != "megatron":
        return
    backend, model = config.backend, config.model
    if config.method in WHOLE_DISTRIBUTIONS:
        yield _problem(
            "backend.use", f"'megatron', but {config.method} compares the probabilities of all words", "fsdp"
        )
    for name, remedy in (("adapter", "fsdp or deepspeed"), ("quantization", "deepspeed")):
        if getattr(model, name) is not None:
            yield _problem(f"model.{name}", "given, but the backend megatron trains plain weights only", remedy)
    if model.freeze != FreezeConfig():
        yield _problem("model.freeze", "given, but the backend megatron trains all weights", "fsdp")
    if model.attention == "rows":
        yield _problem("model.attention", "'rows', but megatron runs streams of tokens, not padded rows", "fsdp")
    if backend.precision == "fp16":
        yield _problem("backend.precision", "'fp16', but losses are not scaled there; use bf16", "local")
    if backend.sequence_parallel and backend.tensor_parallel == 1:
        text = "it divides what backend.tensor_parallel ranks would hold alike, and that is 1"
        yield Problem(
            ("backend", "sequence_parallel"),
            f"backend.sequence_parallel is {show(True)}, but {text}; raise backend.tensor_parallel, or remove it",
        )


def _problem(path: str, what: str, other: str) -> Problem:
    return Problem(tuple(path.split(".")), f"{path} is {what}; change it, or set backend.use to {other}")
