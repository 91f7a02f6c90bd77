"""What to change where nothing fits: one thing after the other, mildest first, until it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from whet.config.run import RunConfig
from whet.plan.choose import Outcome, Planned

MOST = 6
"""Doublings of the number of machines that are tried."""


@dataclass(frozen=True)
class Remedy:
    """Settings to change, with those before it, what is lost by it, and what the best arrangement then takes."""

    settings: Mapping[str, Any]
    costs: str
    outcome: Outcome


GAIN = 0.02
"""Of what is missing, the least share that a change has to bring."""

Change = Callable[[RunConfig, Planned], Mapping[str, Any]]


def _fewer_tokens(config: RunConfig, planned: Planned) -> Mapping[str, Any]:
    load = planned.load
    least = max(1024, load.longest_unit if load.paired else load.longest_row)
    return {"backend.max_tokens_per_device": least} if config.backend.max_tokens_per_device > least else {}


def _smaller_units(config: RunConfig, planned: Planned) -> Mapping[str, Any]:
    if planned.method.source == "prompts":
        return {"rollout.max_tokens": config.rollout.max_tokens // 2} if config.rollout.max_tokens > 1024 else {}
    return {"data.max_length": config.data.max_length // 2} if config.data.max_length > 1024 else {}


def _half_weights(config: RunConfig, planned: Planned) -> Mapping[str, Any]:
    return {"model.dtype": "bfloat16"} if config.model.dtype == "float32" else {}


def _adapter(config: RunConfig, planned: Planned) -> Mapping[str, Any]:
    return {"model.adapter.rank": 16} if config.model.adapter is None else {}


def _quantised(config: RunConfig, planned: Planned) -> Mapping[str, Any]:
    return {"model.quantization.bits": 4} if config.model.quantization is None else {}


SHORTER = "longer sequences are cut or dropped"
CHANGES: tuple[tuple[Change, str], ...] = (
    (_fewer_tokens, "more, smaller micro-batches: the same result, a little slower"),
    (_smaller_units, SHORTER),
    (_half_weights, "weights and optimizer in 16 bits lose small updates"),
    (_adapter, "an adapter is trained in place of the weights"),
    (_quantised, "frozen weights in 4 bits; slower, and a little less exact"),
)


def remedies(planned: Planned) -> Iterator[Remedy]:
    """Changes that add up, each with what it leads to, the last of them fitting if any does; then more machines.

    What brings the best arrangement no nearer is left out.
    """
    given: dict[str, Any] = {}
    nearest, current = planned.nearest, planned
    for change, costs in (*CHANGES, *[(_smaller_units, SHORTER)] * 3):
        settings = change(current.config, current)
        if not settings:
            continue
        tried = replace(planned, config=changed(planned.config, given | settings))
        outcome = tried.best or tried.nearest
        if not outcome.fits and outcome.excess > (1 - GAIN) * nearest.excess:
            continue
        yield Remedy(settings, costs, outcome)
        given, nearest, current = given | settings, outcome, tried
        if outcome.fits:
            break
    if planned.machines is not None:
        yield from _more_machines(planned)


def _more_machines(planned: Planned) -> Iterator[Remedy]:
    """The fewest machines, by doubling, on which the run fits as it is."""
    machines = planned.machines
    assert machines is not None, "there is nothing to double"
    for _ in range(MOST):
        if machines.per_node < 8:
            machines = replace(machines, per_node=machines.per_node * 2)
        else:
            machines = replace(machines, nodes=machines.nodes * 2)
        best = replace(planned, machines=machines).best
        if best is not None:
            nodes = {"--nodes": machines.nodes} if machines.nodes > 1 else {}
            settings = {"--gpus": f"{machines.per_node}x{machines.gpu.name}", **nodes}
            yield Remedy(settings, "or more machines, and nothing else changed", best)
            return


def changed(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The configuration with other settings, by their dotted names."""
    values = config.model_dump()
    for name, value in settings.items():
        *sections, last = name.split(".")
        here = values
        for section in sections:
            if here.get(section) is None:
                here[section] = {}
            here = here[section]
        here[last] = value
    return RunConfig.model_validate(values)
