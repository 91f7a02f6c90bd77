"""The curves of one or several runs, drawn from their metrics.jsonl into one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from whet.errors import DataError
from whet.view.style import COLOURS, STYLE

_SMOOTH_FROM = 40


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its title and the metrics drawn in it.

    `run` limits it to one run, by the name of the folder that holds its metrics file. `percent` shows
    shares between 0 and 1 as percentages.
    """

    title: str
    metrics: tuple[str, ...]
    y_label: str = ""
    percent: bool = False
    run: str | None = None


PANELS = (
    Panel("Loss", ("loss", "eval/loss"), y_label="nats per token"),
    Panel("Token accuracy", ("mean_token_accuracy", "eval/mean_token_accuracy"), percent=True),
    Panel("Reward", ("rollout/reward", "eval/reward")),
    Panel("Response length", ("rollout/response_length_mean", "eval/response_length_mean"), y_label="tokens"),
    Panel("Entropy", ("entropy", "train/entropy"), y_label="nats per token"),
    Panel("Gradient norm", ("grad_norm", "train/grad_norm")),
)


@dataclass(frozen=True)
class _Series:
    """The finite points of one metric in one run."""

    run: str
    metric: str
    steps: list[int]
    values: list[float]


def draw_curves(
    metrics_jsonl: Path | Sequence[Path], out_png: Path, panels: Sequence[Panel] = PANELS, *, title: str = ""
) -> Path:
    """Draw the panels for which the runs have points, and return the picture's path.

    Several runs share a panel, one colour each. A curve of many noisy points is drawn pale, with its
    running mean on top. Points that are not finite (null) are left out.
    Raises DataError if a file is missing or broken, or if no panel has a point.
    """
    files = [metrics_jsonl] if isinstance(metrics_jsonl, str | Path) else list(metrics_jsonl)
    runs = {Path(file): _read(Path(file)) for file in files}
    drawn = [(panel, series) for panel in panels if (series := list(_series(panel, runs)))]
    if not drawn:
        wanted = ", ".join(name for panel in panels for name in panel.metrics)
        raise DataError(f"{', '.join(map(str, files))}: no points to draw; none of the metrics {wanted} was logged")
    columns = 2 if len(drawn) in (2, 4) else min(len(drawn), 3)
    rows = math.ceil(len(drawn) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * columns, 3.2 * rows + (0.3 if title else 0)), layout="constrained")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        for position, (panel, series) in enumerate(drawn, start=1):
            _draw(figure.add_subplot(rows, columns, position), panel, series)
        out_png = Path(out_png)
        out_png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out_png, dpi=150)
    return out_png


def running_mean(values: Sequence[float], span: int) -> list[float]:
    """Mean of about `span` points around each one; near the ends of fewer, so that no trend lags."""
    means = []
    for i in range(len(values)):
        reach = min(span // 2, i, len(values) - 1 - i)
        means.append(sum(values[i - reach : i + reach + 1]) / (2 * reach + 1))
    return means


def _read(path: Path) -> list[dict]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the metrics.jsonl of a run")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{path}:{number}: expected {{"step": …, …}}, got {line.strip()[:80]!r}') from error
    return records


def _series(panel: Panel, runs: dict[Path, list[dict]]) -> Iterator[_Series]:
    for path, records in runs.items():
        run = path.resolve().parent.name
        if panel.run not in (None, run):
            continue
        for metric in panel.metrics:
            points = [(r["step"], r[metric]) for r in records if r.get(metric) is not None]
            if points:
                yield _Series(run, metric, [step for step, _ in points], [value for _, value in points])


def _draw(axes: Axes, panel: Panel, series: Sequence[_Series]) -> None:
    several_runs = len({one.run for one in series}) > 1
    several_metrics = len({one.metric for one in series}) > 1
    for colour, one in zip(_cycle(len(series)), series, strict=True):
        label = " ".join(filter(None, [one.run if several_runs else "", one.metric if several_metrics else ""]))
        if len(one.steps) >= _SMOOTH_FROM:
            axes.plot(one.steps, one.values, color=colour, alpha=0.25, linewidth=0.9)
            smooth = running_mean(one.values, span=len(one.values) // 10)
            axes.plot(one.steps, smooth, color=colour, linewidth=1.8, label=label)
        else:
            axes.plot(one.steps, one.values, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=label)
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.percent:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(series) > 1:
        axes.legend(fontsize=8)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
