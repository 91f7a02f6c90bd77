"""What a run tells while it runs: metrics.jsonl, TensorBoard, a progress bar, and the logger `whet`."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, track

from whet.checkpoints.disk import writing
from whet.config.train import LogConfig
from whet.errors import CheckpointError, ConfigError

logger = logging.getLogger("whet")

Item = TypeVar("Item")

METRICS_FILE = "metrics.jsonl"
LINE_INTERVAL_S = 10.0
_SHOWN = ("loss", "reward", "accuracy", "accuracies", "margins", "tokens_per_s")
_TOLD = re.compile(
    r"eval/(\w+/)?(loss|perplexity|mean_token_accuracy|reward|truncated_ratio|pass@\d+|accuracy|margin"
    r"|rewards/(accuracies|margins))"
)
"""Metrics of an evaluation that are told at once; the file holds all."""


class RunLog:
    """The log of one run.

    `log` writes one JSON object per line to `output_dir/metrics.jsonl`, as in
    `{"step": 3, "train/loss": 2.31}`, and the same numbers to TensorBoard. JSON has no word for NaN
    and the infinities: they are written as null. On resume, whatever the killed run logged after
    `resume_step` is dropped, so that the file reads as if nothing had happened; a new run
    (`resume_step` 0) starts an empty file.
    """

    def __init__(self, output_dir: str | Path, config: LogConfig, *, total_steps: int, resume_step: int = 0) -> None:
        self._config = config
        self._total_steps = total_steps
        self.path = Path(output_dir) / METRICS_FILE
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_lines_after(self.path, resume_step)
            self._file = self.path.open("a", encoding="utf-8")
            self._board = _open_board(self.path.parent / "tensorboard", resume_step) if config.tensorboard else None
        self._meter = Meter(total_steps, resume_step) if config.progress else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log what was measured at `step`; metric names are `role/quantity`.

        Of the training metrics, every `log.every_steps`-th step and the last are written; metrics of
        an evaluation (`eval/…`) are always written, and shown as a line of their own.
        """
        evaluated = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        if evaluated or step == self._total_steps or step % self._config.every_steps == 0:
            self._write(step, metrics)
        if evaluated:
            shown = {name: value for name, value in evaluated.items() if _TOLD.fullmatch(name)}
            self.message(f"step {step}: {describe(shown or evaluated)}")
        if self._meter and len(evaluated) < len(metrics):
            self._meter.show(step, metrics)

    def message(self, text: str) -> None:
        """Tell something in words, above the progress bar."""
        logger.info(text)

    def close(self) -> None:
        """Close the files and take leave of the progress bar. May be called twice."""
        if self._meter:
            self._meter.close()
        with writing(self.path):
            self._file.close()
            if self._board is not None:
                self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            assert isinstance(value, int | float), f"metric {name} is a {type(value).__name__}, not a plain number"
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with writing(self.path):
            self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in metrics.items():
                    self._board.add_scalar(name, value, step)


class Meter:
    """The progress bar on a terminal; elsewhere a plain line now and then. `what` is counted: `step`."""

    def __init__(self, total_steps: int, done: int, what: str = "step") -> None:
        self._total_steps = total_steps
        self._first, self._what = done, what
        self._start = time.monotonic()
        self._last_line: float | None = None
        self._bar: Progress | None = None
        if console().is_terminal:
            columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=console())
            self._task = self._bar.add_task("", total=total_steps, completed=done, text="")
            self._bar.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        left_s = (now - self._start) / max(1, step - self._first) * max(0, self._total_steps - step)
        chosen = {
            name: value
            for name, value in metrics.items()
            if name.rpartition("/")[2] in _SHOWN and not name.startswith("eval/")
        }
        text = " · ".join([*filter(None, [describe(chosen)]), f"{_clock(left_s)} left"])
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif self._last_line is None or step == self._total_steps or now - self._last_line >= LINE_INTERVAL_S:
            self._last_line = now
            logger.info(f"{self._what} {step}/{self._total_steps} · {text}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def progress_over(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """The items, with a bar on a terminal, or else a line now and then, where they take longer than a moment."""
    if console().is_terminal:
        yield from track(items, what, total, console=console(), transient=True)
        return
    told = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - told >= LINE_INTERVAL_S:
            told = time.monotonic()
            logger.info("%s: %d of %d", what, number, total)


def drop_lines_after(path: Path, step: int) -> None:
    """Rewrite a metrics file without the lines after `step`, atomically; with step 0, without any.

    A last line that was cut short when its run was killed is dropped as well.
    Raises CheckpointError if another line is no JSON object with a step.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if step else []
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            line_step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise CheckpointError(
                f"{path}:{number} is no line of metrics: {line.strip()[:80]!r}; "
                "remove the line, or move the file away to start a new one"
            ) from error
        if line_step <= step:
            kept.append(line)
    scratch = path.with_suffix(".jsonl.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def describe(metrics: Mapping[str, float]) -> str:
    """Metrics as one line of text: `eval/loss 2.134 · eval/accuracy 0.4375`."""
    return " · ".join(f"{name} {_number(value)}" for name, value in metrics.items())


@functools.cache
def console() -> Console:
    """The one console, shared by the progress bar and the logger so that neither overwrites the other."""
    return Console()


def setup_logging(level: int = logging.INFO) -> None:
    """Send the messages of `whet` to standard output: for programs, never for a library that imports us.

    On a terminal they go through rich; elsewhere they are plain lines with the time. Calling it again
    replaces the handler, so no line appears twice.
    """
    if console().is_terminal:
        handler: logging.Handler = RichHandler(console=console(), show_path=False, log_time_format="%H:%M:%S")
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False


def quiet_libraries() -> None:
    """Silence what libraries say of themselves: load bars, tokenizer forks, hub advice.

    Acts through the environment, so call it before transformers is imported; what a user has set
    there stays.
    """
    quiet = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TQDM_DISABLE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # of processes that cannot reach one another we say who is missing
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    for name in ("huggingface_hub", "httpx", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Imported by others wherever it is installed; it sets the level of its logger itself.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|huggingface_hub)\b")


def _open_board(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "log.tensorboard is true, but tensorboard is not installed; "
            "run `pip install tensorboard` or set log.tensorboard to false"
        ) from error
    # TensorBoard hides what older event files hold from purge_step on.
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0, flush_secs=10)


def _number(value: float) -> str:
    if isinstance(value, int) or not math.isfinite(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
