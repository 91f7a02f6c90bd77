"""Preparation: data files become tokenised units, once; the result is kept on disk by content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from whet.config.data import DataConfig
from whet.data import cache
from whet.data.builder import Builder
from whet.data.encode import Encoder, digest_tokenizer
from whet.data.prepared import Arrays, Prepared, refuse_share, summarise
from whet.data.problems import Malformed, Problems
from whet.data.recognise import SHAPES, read_items
from whet.data.rows import Source, parse_sources
from whet.data.shapes import Task
from whet.data.template import Renderer
from whet.data.tokenise import Progress, tokenise
from whet.data.units import drafts, require_margins
from whet.errors import ConfigError, Gathering

logger = logging.getLogger(__name__)

# What tokens and masks follow from; the settings that only refuse or select are left out.
_SETTINGS = {
    *("columns", "prompt_template", "response_template", "system", "chat", "template_kwargs", "train_on"),
    *("max_length", "on_too_long"),
}


def prepare(
    cfg: DataConfig,
    paths: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    what: str = "train",
    task: Task = "sft",
    progress: Progress | None = None,
    errors: Gathering | None = None,
) -> Prepared:
    """The rows of `paths` as units of tokens and masks, tokenised now or read from the cache.

    `task` says what rows are read and what a unit is. `sft`: a row to imitate. `preference`: a pair, the chosen
    sample and the rejected one, with labels 1 and 0, and the row's margin if it has one. `reward`: the same for
    a reward model; a sample always ends with the token that ends its answer, even if it is truncated.
    `unpaired`: a sample with its label; pairs become two such units.
    `what` (`train`, `eval`) begins the units' ids. Sequences longer than `data.max_length` tokens are
    truncated at the end, dropped or refused, as `data.on_too_long` says; a row that truncation leaves
    without a trained token, on either side of a pair, is dropped and counted, and so is a pair of twice the
    same tokens.
    Raises DataError for files and rows that cannot be used, all at once, and when more than
    `data.max_cut_share` of the rows is truncated or dropped; ModelError when the tokenizer lacks the
    chat template or end-of-sequence token that the rows need; ConfigError for `data.train_on: all` with
    another task than `sft`. With `errors`, what is wrong with rows goes there, and the other rows are prepared.
    """
    if task != "sft" and cfg.train_on == "all":
        raise ConfigError("data.train_on is 'all', but what is judged are completions; set it to 'completion'")
    sources = parse_sources(paths)
    root = cache.root_of(cfg.cache_dir)
    folder = root / f"{task}-{_key(cfg, sources, tokenizer)[:32]}"
    found = cache.load(folder)
    if found is None:
        found = built, notes = _build(cfg, sources, tokenizer, task, progress, errors)
        if errors is None or not errors.errors:
            cache.store(folder, built, notes)
            cache.trim(root, cfg.cache_gb, keep=folder)
            # Mapped from disk rather than held in memory, unless another process has just taken its place.
            found = cache.load(folder) or found
    content, notes = found
    arrays = Arrays(**content)
    everything = np.arange(len(arrays.rows))
    left_out = {name: notes[name] for name in ("dropped", "untrained", "identical")}
    report = summarise(arrays, everything, **left_out)
    prepared = Prepared(what, arrays, sources, everything, report, _fingerprint(task, content), task)
    with Gathering.of(errors) as errors, errors.going_on():
        _refuse_cuts(cfg, prepared)
    if report.identical:
        source, number = notes["first_identical"]
        logger.warning(
            "%s of %s rows are left out: their chosen and rejected completions are the same tokens (the first: %s)",
            *(f"{report.identical:,}", f"{report.rows:,}", sources[source].place(number)),
        )
    return prepared


def preview(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, i: int, *, sample: int = 0
) -> list[tuple[str, bool]]:
    """A sample of the i-th unit as the model will see it: stretches of text, and whether they are trained."""
    shown = prepared[i].samples[sample]
    stretches = groupby(zip(shown.tokens, shown.loss_mask, strict=True), key=lambda pair: pair[1])
    return [
        (tokenizer.decode([token for token, _ in pairs], clean_up_tokenization_spaces=False), trained)
        for trained, pairs in stretches
    ]


def _build(
    cfg: DataConfig,
    sources: tuple[Source, ...],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    progress: Progress | None,
    errors: Gathering | None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    problems = Problems()
    renderer, encoder = Renderer(cfg, tokenizer), Encoder(tokenizer)
    builder = Builder(task, cfg.max_length, cfg.on_too_long)
    numbers = {source: number for number, source in enumerate(sources)}
    items = require_margins(read_items(sources, cfg.columns, SHAPES[task], problems), problems)
    render = renderer.sequences if task == "sft" else renderer.sides
    for placed, samples in tokenise(items, render, encoder, problems, progress, go_on=errors is not None):
        place = numbers[placed.row.source], placed.row.number
        try:
            units = drafts(task, placed.item, samples, encoder)
            for draft in units:
                builder.add(*place, draft)
        except Malformed as fault:
            problems.add(fault.kind, f"{placed.row.place}: {fault}")
        else:
            if not units:
                builder.skip(*place, max(len(sample.tokens) for sample in samples))
    if errors is None or not builder.tokens:
        problems.raise_any()
    else:
        with errors.going_on():
            problems.raise_any()
    return builder.arrays(), builder.notes()


def _fingerprint(task: Task, arrays: dict[str, np.ndarray]) -> str:
    """Identifies tokens and masks; for what is judged, how as well."""
    parts: list[Any] = [cache.checksums({name: arrays[name] for name in ("tokens", "mask")})]
    if task != "sft":
        judged = {name: arrays[name] for name in ("labels", "margins", "unit_ends") if name in arrays}
        parts.append(cache.checksums(judged))
    content = json.dumps(parts if task != "sft" else parts[0])
    return hashlib.sha256(content.encode()).hexdigest()


def _refuse_cuts(cfg: DataConfig, prepared: Prepared) -> None:
    report, lengths = prepared.report, np.sort(prepared.arrays.full_lengths)
    # The least limit under which no more than the allowed share is cut.
    enough = int(lengths[max(0, len(lengths) - 1 - int(len(lengths) * cfg.max_cut_share))])
    lost = f" ({report.untrained:,} with no trained token left)" if report.untrained else ""
    refuse_share(
        report.truncated + report.dropped,
        report.rows,
        cfg,
        what=f"are longer than data.max_length ({cfg.max_length:,} tokens): {report.truncated:,} truncated, "
        f"{report.dropped:,} dropped{lost}; the longest has {report.longest:,}",
        remedy=f"raise data.max_length to {enough:,}",
    )


def _key(cfg: DataConfig, sources: tuple[Source, ...], tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that tokens and masks follow from, this code and its libraries included."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    parts = [
        code.hexdigest(),
        [version(package) for package in ("transformers", "tokenizers", "jinja2", "pyarrow")],
        [source.digest() for source in sources],
        cfg.model_dump(mode="json", include=_SETTINGS),
        digest_tokenizer(tokenizer),
        [member.name for member in fields(Arrays)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
