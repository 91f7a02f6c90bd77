"""The policy, or another model of the run, on servers: what they are told of it, and what they are checked against."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from whet.backends.device import Arithmetic
from whet.backends.protocol import Backend, shares_prefixes
from whet.batch import collate
from whet.cluster.lent import lent_machines
from whet.config.run import RunConfig
from whet.engines.local.weights import num_bytes
from whet.engines.servers import sglang, vllm
from whet.engines.servers.engine import Served, ServerEngine
from whet.errors import ConfigError
from whet.models.adapters import has_adapter
from whet.models.parts import base
from whet.types import Sample, Unit
from whet.weights.buckets import short
from whet.weights.checkpoint_names import Naming, adapter_parameters, as_checkpoint
from whet.weights.snapshot import Snapshot
from whet.weights.stamp import Stamp, stamp

SERVERS: dict[str, tuple[Callable[[], Any], Callable[[bool], str]]] = {
    "vllm": (vllm.Vllm, vllm.remedy),
    "sglang": (sglang.Sglang, sglang.remedy),
}
"""Kinds of servers: how they are spoken to, and what to do when one does not compute with the weights it was given."""
BEGINS_AS_BASE = ("default", "gaussian")
"""Beginnings of an adapter that leave the weights beneath as they are."""


def server_engine(
    config: RunConfig,
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
    arithmetic: Arithmetic,
    read: Mapping[str, Stamp],
) -> ServerEngine:
    """An engine of servers that sample from the model of this backend; `read` tells of folders as they were when the
    trainer read them. Raises ConfigError for what they cannot do."""
    if config.engine.sleep and arithmetic.device.type == "cpu" and config.engine.address is None:
        raise ConfigError(
            "engine.sleep is true, but servers on a CPU have no memory of a GPU to give up; remove it, or use a GPU"
        )
    model: nn.Module = backend.model
    inner, engine = base(model), config.engine
    text = inner.config.get_text_config()
    naming = Naming(inner, _scales(model))
    dtype = str(engine.options.get("dtype") or short(arithmetic.autocast or inner.dtype))
    adapter, rank = _adapter(model, config)
    untouched = _untouched(model)
    served = Served(
        model=inner.name_or_path,
        dtype=dtype,
        vocabulary=text.vocab_size,
        num_bytes=num_bytes(model),
        stop_token_ids=tuple(stop_token_ids),
        max_positions=getattr(text, "max_position_embeddings", None),
        tokenizer=tokenizer,
        output_dir=Path(config.output_dir).absolute(),
        seed=config.seed,
        device=arithmetic.device,
        precise=dtype == "float32" and arithmetic.autocast is None and arithmetic.matmul == "highest",
        holds_current=lambda: engine.address is None and not has_adapter(model) and untouched(),
        snapshot=lambda version: snapshot(backend, version, naming, has_adapter=has_adapter(model)),
        expected=_expected(backend),
        stands_still=config.rollout.mode == "sync",
        colocated=config.cluster.colocate,
        first_device=0 if config.cluster.colocate else config.cluster.size,
        adapter=adapter,
        adapter_rank=rank,
        read=read.get(inner.name_or_path) or stamp(inner.name_or_path),
        machines=lent_machines(),
    )
    dialect, remedy = SERVERS[engine.use]
    return ServerEngine(dialect(), engine, served, remedy)


def snapshot(backend: Backend, version: int, naming: Naming, *, has_adapter: bool) -> Snapshot:
    """The weights of a backend's model as they are now."""

    def tensors() -> Any:
        return as_checkpoint(backend.weights(), naming)

    def adapter() -> Any:
        return adapter_parameters(backend.weights(trained=True))

    return Snapshot(version, tensors, adapter if has_adapter else None)


def _expected(backend: Backend) -> Callable[[Sequence[int], int], list[float]]:
    """The backend's own logprobs of the last tokens of a sequence."""

    def expected(tokens: Sequence[int], count: int) -> list[float]:
        mask = [place >= len(tokens) - count for place in range(len(tokens))]
        batch = collate([Unit("probe", (Sample(tuple(tokens), mask),))], share_prefixes=shares_prefixes(backend))
        with backend.at_temperature(1.0):
            return backend.forward(batch, {"logprobs"})["logprobs"][-count:].float().tolist()

    return expected


def _untouched(model: nn.Module) -> Callable[[], bool]:
    """Whether the weights are still those that were loaded: nobody has written to them since."""

    def state() -> list[tuple[int, int]]:
        return [(id(weight), weight._version) for weight in model.parameters()]

    before = state()
    return lambda: state() == before


def _scales(model: nn.Module) -> dict[str, float]:
    """The factor of each module's adapter."""
    found = {}
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and scaling:
            found[name.removeprefix("base_model.model.")] = float(next(iter(scaling.values())))
    return found


def _adapter(model: nn.Module, config: RunConfig) -> tuple[str | None, int | None]:
    """Configuration and rank of an adapter that may be sent alone; None where the whole model has to be."""
    if not has_adapter(model) or config.engine.publish.adapter_only is False:
        return None, None
    settings: Any = model.peft_config[model.active_adapter]
    begins = config.model.adapter.init if config.model.adapter is not None else "default"
    plain = not settings.use_dora and not settings.modules_to_save and begins in BEGINS_AS_BASE
    if config.engine.publish.adapter_only is None and (not plain or config.engine.address is not None):
        return None, None
    told = {**settings.to_dict(), "inference_mode": True, "base_model_name_or_path": base(model).name_or_path}
    return json.dumps(told, default=_plain), int(settings.r)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
