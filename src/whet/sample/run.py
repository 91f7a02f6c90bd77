"""A sampling run from its configuration to its rows: checked, played, selected, reported."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from whet.check.examine import examine
from whet.checkpoints.disk import writing
from whet.checkpoints.folder import RUN_FILE, check_folder, claimed
from whet.config.loader import dump
from whet.config.run import RunConfig
from whet.data.rows import parse_sources
from whet.errors import ConfigError, DataError
from whet.feeds.prompts import PromptFeed
from whet.log import Meter
from whet.methods import SAMPLE
from whet.provenance import sampled_with
from whet.roles import load_policy
from whet.rollout.group import GroupPlayer
from whet.rollout.sampling import sampling_of
from whet.sample.follow import following
from whet.sample.journal import FILE, Journal
from whet.sample.play import StepPlayer, Unscored, group_name
from whet.sample.report import Tally
from whet.sample.rows import rows_of
from whet.sample.select import select
from whet.types import Prompt

logger = logging.getLogger(__name__)

ROWS_FILE, REPORT_FILE, PICTURE_FILE, THEN_FILE = "rows.jsonl", "report.json", "scores.png", "then.yaml"


@dataclass
class SampleRun:
    """A run that has passed every check that needs no model."""

    config: RunConfig
    feed: PromptFeed
    tokenizer: PreTrainedTokenizerBase
    output: Path
    made_with: Mapping[str, str]
    then: RunConfig | None = None
    """The training run that is to follow."""
    _stopped: bool = False
    _playing: tuple[asyncio.AbstractEventLoop, asyncio.Future] | None = field(default=None, repr=False)

    @property
    def prompts(self) -> Sequence[Prompt]:
        assert self.feed.train is not None, "a run without prompts is refused before"
        return self.feed.train.prompts

    async def sample(self) -> dict[str, Any] | None:
        """Play what is missing in the journal, then write rows, report and picture.

        Returns the report, or None where the run was asked to stop; the same command then goes on.
        Raises DataError when no row is selected; the report is there all the same.
        """
        with claimed(self.config.output_dir) as folder, Journal(folder / FILE, self.made_with) as journal:
            with writing(folder / RUN_FILE):
                (folder / RUN_FILE).write_text(dump(self.config), encoding="utf-8")
            if len(journal) < len(self.prompts):
                if len(journal):
                    logger.info("going on with %d of %d prompts in the journal", len(journal), len(self.prompts))
                await self._play(journal)
            if self._stopped:
                logger.info(
                    "stopped with %d of %d prompts in the journal; the same command goes on from here",
                    *(len(journal), len(self.prompts)),
                )
                return None
            return self._finish(folder, journal)

    def request_stop(self) -> None:
        """End as soon as the step in hand can be left; may be called by a signal's handler."""
        self._stopped = True
        if self._playing is not None:
            loop, playing = self._playing
            loop.call_soon_threadsafe(playing.cancel)

    def write_then(self) -> str:
        """The configuration of the training that follows, in a file beside the rows, for processes of its own."""
        assert self.then is not None, "nothing follows"
        path = Path(self.config.output_dir) / THEN_FILE
        with writing(path):
            path.write_text(dump(self.then), encoding="utf-8")
        return str(path)

    async def _play(self, journal: Journal) -> None:
        config, rollout = self.config, self.config.rollout
        policy = load_policy(config, SAMPLE, self.tokenizer, train=False)
        logger.info(", ".join(f"{name} {value}" for name, value in policy.backend.describe().items()))
        self.feed.scorer.load(config.backend)
        engine = policy.engine()
        player = GroupPlayer(
            engine,
            self.feed.env,
            Unscored(),  # type: ignore[arg-type]
            sampling_of(rollout, policy.stop_token_ids),
            tokenizer=self.tokenizer,
            seed=config.seed,
            timeout_s=config.engine.timeout_s,
        )
        meter = Meter(len(self.prompts), len(journal), "prompt") if config.log.progress else None
        steps = StepPlayer(
            self.prompts,
            player,
            self.feed.scorer,
            journal,
            group_size=rollout.group_size,
            per_step=rollout.prompts_per_step,
            meter=meter,
        )
        playing = asyncio.ensure_future(steps.play())
        self._playing = asyncio.get_running_loop(), playing
        try:
            if self._stopped:  # while the model was loaded
                playing.cancel()
            await playing
        except asyncio.CancelledError:
            if not self._stopped:
                raise
        finally:
            self._playing = None
            await engine.close()
            if meter is not None:
                meter.close()

    def _finish(self, folder: Path, journal: Journal) -> dict[str, Any]:
        tally = Tally(self.config.sample)
        write_lines(self.output, self._rows(journal, tally))
        report = tally.report()
        write_lines(folder / REPORT_FILE, [json.dumps(report, indent=1, ensure_ascii=False)])
        draw(tally, folder / PICTURE_FILE)
        logger.info("%d rows are in %s", report["rows"], self.output)
        if not report["rows"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items())
            raise DataError(
                f"no row is selected: of {report['completions']:,} completions {reasons}; lower sample.min_score or "
                f"sample.min_gap, raise rollout.group_size or rollout.max_tokens (see {folder / REPORT_FILE})"
            )
        return report

    def _rows(self, journal: Journal, tally: Tally) -> Iterator[str]:
        for position, group in journal.groups():
            selection = select(group, self.config.sample)
            tally.add(group, selection)
            for row in rows_of(self.prompts[position], group_name(position), selection, self.config.sample):
                yield json.dumps(row, ensure_ascii=False, default=str)


def compose_sampling(config: RunConfig) -> SampleRun:
    """Check model files, rewards and prompts, folders, and the run that is to follow; no model is loaded.

    Raises ConfigError, DataError, CheckpointError or ModelError, or SeveralErrors with all of them.
    """
    found = examine(config, SAMPLE, trains=False)
    output = Path(config.sample.output or Path(config.output_dir) / ROWS_FILE)
    then = None
    with found.errors.going_on():
        check_folder(config.output_dir, config.model)
    with found.errors.going_on():
        check_output(output, config)
    with found.errors.going_on():
        then = following(config, output)
    found.errors.refuse()
    feed, tokenizer = found.feed, found.tokenizer
    assert isinstance(feed, PromptFeed) and feed.train and tokenizer, "what is missing has been refused"
    return SampleRun(config, feed, tokenizer, output, sampled_with(config, feed.train.prompts), then)


def check_output(output: Path, config: RunConfig) -> None:
    """Raise ConfigError for a file that the rows cannot, or must not, be written to."""
    present = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if output.suffix.lower() not in (".jsonl", ".ndjson"):
        raise ConfigError(f"sample.output is {str(output)!r}, but rows are JSON Lines; end its name with .jsonl")
    if output.is_dir() or (present != output.absolute() and not present.is_dir()):
        raise ConfigError(f"sample.output is {str(output)!r}, but {present} is no folder to put it in; choose another")
    place = present if present.is_dir() else present.parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"sample.output is {str(output)!r}, but {place} is not writable; make it writable, or choose another file"
        )
    assert config.data.train is not None, "a run without prompts is refused before"
    sources = parse_sources(config.data.train)
    if any(source.extension and Path(source.path).resolve() == output.resolve() for source in sources):
        raise ConfigError(f"sample.output is {str(output)!r}, the file of the prompts; choose another")


def write_lines(path: Path, lines: Iterator[str] | Sequence[str]) -> None:
    """Write a file of these lines, in one stroke: it is whole, or as it was. Raises CheckpointError."""
    scratch = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)


def draw(tally: Tally, path: Path) -> None:
    """The histogram of the scores, where matplotlib is installed."""
    if not tally.scores:
        return
    if find_spec("matplotlib") is None:
        logger.info(
            "%s is not drawn, as matplotlib is not installed (pip install -e '.[demo]' in the checkout of whet)", path
        )
        return
    from whet.view.histogram import draw_scores

    scratch = path.with_name(f".{path.name}.tmp")
    with writing(path):
        draw_scores(tally.scores, tally.best, tally.config.threshold, scratch, title="Scores")
        scratch.replace(path)
