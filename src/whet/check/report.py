"""What `whet check` prints: the data in numbers, rows with their loss, memory, then warnings and errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from whet.check.examine import Examined
from whet.check.memory import Estimate
from whet.check.preview import MARKS, previews
from whet.data.prepared import Prepared


def show(found: Examined, errors: Sequence[str], warnings: Sequence[str], console: Console, *, rows: int) -> None:
    """Print everything, what is wrong at the end, where a terminal stops. `errors` and `warnings` are sentences."""
    if facts := list(_facts(found)):
        console.print(Text("data", style="bold"))
        for name, text in facts:
            console.print(Text(f"  {name:10} {text}"), soft_wrap=True)
    _rows(found, console, rows)
    if found.memory is not None:
        _memory(found.memory, console)
    for title, texts, style in (("warning", warnings, "bold yellow"), ("error", errors, "bold red")):
        if texts:
            console.print(Text(f"{len(texts)} {title}{'s' * (len(texts) > 1)}", style=style))
            for text in texts:
                console.print(Text(f"  - {text}"), soft_wrap=True)
    verdict = "nothing stands in the way" if not errors else "not ready to train"
    console.print(Text(verdict, style="bold green" if not errors else "bold red"))


def _facts(found: Examined) -> Iterator[tuple[str, str]]:
    for name, part in found.parts.items():
        yield name, str(part.report)
        if isinstance(part, Prepared) and found.stop_token_ids:
            yield "", f"{part.share_training_one_of(found.stop_token_ids):.1%} of the rows train a stop token"
    if found.schedule is not None and found.work is not None:
        schedule, work = found.schedule, found.work
        yield "steps", f"{schedule.steps_per_epoch:,} per epoch, {schedule.total_steps:,} in all"
        cut = ", which is cut into micro-batches" if work.micro.again else ""
        yield (
            "tokens",
            (
                f"at most {work.step_tokens:,} in an optimizer step{cut}; at most {work.micro.tokens:,} in a "
                "micro-batch (shared prefixes once)"
            ),
        )


def _rows(found: Examined, console: Console, rows: int) -> None:
    if found.tokenizer is None or not rows:
        return
    colour = console.color_system is not None
    for name, part in found.parts.items():
        key = "" if colour else f" (trained: {MARKS[0]}so{MARKS[1]})"
        console.print(Text(f"{name} rows as the model sees them{key}", style="bold"))
        for place, text in previews(part, found.tokenizer, rows, colour=colour):
            console.print(Text(f"  {place}", style="cyan"))
            console.print(text, soft_wrap=True)


def _memory(estimate: Estimate, console: Console) -> None:
    """A table of the moments of a run by what they hold."""
    names = list(dict.fromkeys(name for moment in estimate.moments for name, size in moment.parts.items() if size))
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column("memory, MiB")
    for moment in estimate.moments:
        table.add_column(moment.name, justify="right", style="bold" if moment is estimate.peak else None)
    for name in names:
        table.add_row(name, *(_mib(moment.parts.get(name, 0)) for moment in estimate.moments))
    table.add_row("in all", *(_mib(moment.total) for moment in estimate.moments))
    console.print(table)
    has = "" if estimate.available is None else f", which has {_mib(estimate.available)} MiB left"
    console.print(Text(f"at most about {_mib(estimate.peak.total)} MiB on {estimate.device}{has}"))


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"
