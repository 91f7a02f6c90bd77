"""What `whet plan` prints: the run in numbers, arrangements with their memory and time, what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from whet.check.memory import Estimate
from whet.plan import speed as rates
from whet.plan.arrangement import settings_of
from whet.plan.choose import Outcome, Planned
from whet.plan.remedies import Remedy

GB, MIB = 1e9, 2.0**20
LEAST = 1e8
"""Parameters from which on times are worth telling: a smaller model waits for other things than arithmetic."""


def show(planned: Planned, console: Console) -> None:
    """The run, and what its configuration takes as it is."""
    policy, load, lengths = planned.models.policy, planned.load, planned.load.lengths
    trained = policy.held.trained / max(policy.held.weights, 1.0)
    share = "all" if trained == 1 else f"{trained:.2%} of the bytes"
    _fact(console, "model", f"{policy.cfg.path}: {_count(policy.parameters)} parameters, {share} trained")
    beside = [("critic", (planned.models.critic,) if planned.models.critic else ())]
    beside += [("frozen", planned.models.frozen), ("reward", planned.models.rewards)]
    for name, models in beside:
        for model in models:
            _fact(console, name, f"{model.cfg.path}: {_count(model.parameters)} parameters")
    mean = "the mean is given" if planned.lengths is not None else "the mean is assumed: half of the longest"
    prompts = f"prompts of {lengths.prompt:,} tokens (at most {lengths.longest_prompt:,})"
    completions = f"completions of {lengths.response:,} (at most {lengths.longest_response:,})"
    _fact(console, "step", f"{load.units:,} units of {load.rows}, {prompts}, {completions}; {mean}")
    _outcome(console, "as configured", planned.configured, planned)


def show_best(planned: Planned, best: Outcome, console: Console) -> None:
    """The arrangement that is fastest of all that fit."""
    fitting = sum(one.fits for one in planned.candidates)
    _outcome(console, f"best of {fitting:,} that fit", best, planned)
    per_node = planned.machines.per_node if planned.machines else 1
    console.print(Text(f"  {flags(settings_of(best.how, per_node, planned.config))}"), soft_wrap=True)


def show_nearest(planned: Planned, console: Console) -> None:
    """What lacks least where nothing fits, before anything is changed."""
    console.print(Text(f"nothing fits on {planned.machines}", style="bold red"))
    text = f"  0. as it is: {_excess(planned.nearest)}, with {planned.nearest.how}; in this order:"
    console.print(Text(text), soft_wrap=True)


def show_remedy(number: int, remedy: Remedy, console: Console) -> None:
    """One change, and what it leads to."""
    outcome = remedy.outcome
    says = "fits" if outcome.fits else f"still {_excess(outcome)}"
    text = f"  {number}. {flags(remedy.settings)}  ({remedy.costs}): {says}, with {outcome.how}"
    console.print(Text(text), soft_wrap=True)


def show_rates(console: Console) -> None:
    """The assumptions behind the times."""
    text = (
        f"times assume {rates.TRAINING:.0%} of peak FLOP/s in training ({rates.TRAINING_EXPERTS:.0%} with experts), "
        f"{rates.FORWARD:.0%} in forward passes, {rates.READING:.0%} of the memory's bandwidth in decoding, "
        f"{rates.LINK:.0%} of links; memory is that of the longest sequences"
    )
    console.print(Text(text, style="dim"), soft_wrap=True)


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as a command line has them."""
    texts = []
    for name, value in settings.items():
        name = name if name.startswith("--") else f"--{name}"
        texts.append(f"{name} {str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(texts)


def _excess(outcome: Outcome) -> str:
    if outcome.missing:
        return f"{outcome.missing} GPUs too few"
    return f"{_size(max(0.0, outcome.excess))} too much"


def _size(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / MIB:,.0f} MiB"


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e8 else f"{parameters / 1e6:.2g}M"


def _fact(console: Console, name: str, text: str) -> None:
    console.print(Text(f"{name:8} {text}"), soft_wrap=True)


def _outcome(console: Console, title: str, outcome: Outcome, planned: Planned) -> None:
    where = "this machine's CPU" if planned.machines is None else str(planned.machines)
    if outcome.missing:
        where = f"{outcome.how.total} GPUs, {outcome.missing} more than {planned.machines}"
    console.print(Text(f"{title}: {outcome.how}, on {where}", style="bold"), soft_wrap=True)
    _memory(console, outcome.training, "that trains")
    if outcome.sampling is not None:
        _memory(console, outcome.sampling, "that samples")
    if outcome.speed is not None and not outcome.missing and planned.models.policy.parameters >= LEAST:
        parts = ", ".join(f"{name} {_seconds(s)}" for name, s in outcome.speed.parts.items())
        together = " at the same time" if outcome.speed.overlaps else ""
        console.print(
            Text(
                f"  a step takes about {_seconds(outcome.speed.step_s)} ({parts}{together}): "
                f"{outcome.speed.tokens_per_s:,.0f} tokens/s, "
                f"{outcome.speed.tokens_per_s / max(1, outcome.how.total):,.0f} per GPU"
            ),
            soft_wrap=True,
        )


def _memory(console: Console, estimate: Estimate, which: str) -> None:
    names = list(dict.fromkeys(name for moment in estimate.moments for name, size in moment.parts.items() if size))
    table = Table(box=None, padding=(0, 2, 0, 2))
    unit, name_of_unit, digits = (GB, "GB", 2) if estimate.peak.total >= GB else (MIB, "MiB", 0)
    table.add_column(f"{name_of_unit} of a device {which}")
    for moment in estimate.moments:
        table.add_column(moment.name, justify="right", style="bold" if moment is estimate.peak else None)
    for name in names:
        table.add_row(name, *(f"{moment.parts.get(name, 0) / unit:,.{digits}f}" for moment in estimate.moments))
    table.add_row("in all", *(f"{moment.total / unit:,.{digits}f}" for moment in estimate.moments))
    console.print(table)
    has = "" if estimate.available is None else f" of {estimate.available / GB:.1f} GB"
    verdict = "" if estimate.available is None else ": fits" if estimate.fits else ": does not fit"
    style = None if estimate.fits else "bold red"
    console.print(Text(f"  at most about {_size(estimate.peak.total)}{has}{verdict}", style=style or ""))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s"
