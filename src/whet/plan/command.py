"""`whet plan`: what a run takes on machines that need not be there, and how it is best laid out over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console

from whet.config.run import RunConfig
from whet.errors import ConfigError
from whet.hardware import Machines, gpu_named, read_machines
from whet.plan import report
from whet.plan.choose import Planned
from whet.plan.load import Lengths, assumed
from whet.plan.remedies import remedies
from whet.recipe import method_of


@dataclass(frozen=True)
class Wanted:
    """What is asked of a plan: GPUs as in `8xH100-80G`, how many nodes of these, and mean lengths."""

    gpus: str | None = None
    nodes: int = 1
    prompt_tokens: int | None = None
    response_tokens: int | None = None


def plan(config: RunConfig, console: Console, wanted: Wanted, lengths: Lengths | None = None) -> bool:
    """Print the plan of a run. Returns whether the run fits, as it is configured or laid out otherwise.

    `lengths` are those of its data, where they are known.
    Raises ConfigError for GPUs that are not known, ModelError for a model whose shape is not to be found.
    """
    machines = read_machines(wanted.gpus, wanted.nodes) if wanted.gpus else these_machines()
    planned = Planned(config, machines, lengths_of(config, wanted, lengths))
    report.show(planned, console)
    if machines is None:
        return planned.configured.fits
    best = planned.best
    if best is not None and best.how != planned.configured.how:
        report.show_best(planned, best, console)
    if best is None and not planned.configured.fits:
        report.show_nearest(planned, console)
        for number, remedy in enumerate(remedies(planned), 1):
            report.show_remedy(number, remedy, console)
    report.show_rates(console)
    return best is not None or planned.configured.fits


def these_machines() -> Machines | None:
    """The GPUs of this machine; None where it has none. Raises ConfigError for a kind that is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0)
    gpu = gpu_named(name)
    if gpu is None:
        raise ConfigError(f"the speed of {name} is not known; name one that is like it with --gpus, as in 8xH100-80G")
    return Machines(gpu, torch.cuda.device_count())


def lengths_of(config: RunConfig, wanted: Wanted, known: Lengths | None) -> Lengths | None:
    """Mean lengths as they were asked for, else as they are known; None where neither says anything."""
    if wanted.prompt_tokens is None and wanted.response_tokens is None:
        return known
    known = known or assumed(config, method_of(config))
    prompt, response = wanted.prompt_tokens or known.prompt, wanted.response_tokens or known.response
    return Lengths(prompt, response, max(prompt, known.longest_prompt), max(response, known.longest_response))
