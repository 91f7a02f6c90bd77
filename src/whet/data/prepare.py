"""Preparation: data files become tokenised units, once; the result is kept on disk by content."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from whet.config.data import DataConfig
from whet.data import cache
from whet.data.encode import Encoded, Encoder, digest_tokenizer
from whet.data.prepared import Arrays, Prepared, refuse_share, summarise
from whet.data.problems import Malformed, Problems
from whet.data.rows import Source, parse_sources
from whet.data.shapes import SFT_SHAPES, read_items
from whet.data.template import Renderer
from whet.data.tokenise import Progress, tokenise
from whet.errors import DataError

# What tokens and masks follow from; the settings that only refuse or select are left out.
_SETTINGS = {
    *("columns", "prompt_template", "response_template", "system", "chat", "train_on"),
    *("max_length", "on_too_long"),
}


def prepare(
    cfg: DataConfig,
    paths: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    what: str = "train",
    progress: Progress | None = None,
) -> Prepared:
    """The rows of `paths` as units of tokens and masks, tokenised now or read from the cache.

    `what` (`train`, `eval`) begins the units' ids. Sequences longer than `data.max_length` tokens are
    truncated at the end, dropped or refused, as `data.on_too_long` says; a row that truncation leaves
    without a trained token is dropped and counted.
    Raises DataError for files and rows that cannot be used, all at once, and when more than
    `data.max_cut_share` of the rows is truncated or dropped; ModelError when the tokenizer lacks the
    chat template or end-of-sequence token that the rows need.
    """
    sources = parse_sources(paths)
    root = Path(cfg.cache_dir).expanduser() if cfg.cache_dir else cache.default_folder()
    folder = root / f"sft-{_key(cfg, sources, tokenizer)[:32]}"
    found = cache.load(folder)
    if found is None:
        built, notes = _build(cfg, sources, tokenizer, progress)
        cache.store(folder, built, notes)
        # Mapped from disk rather than held in memory, unless another process has just taken its place.
        found = cache.load(folder) or (built, notes)
    content, notes = found
    arrays = Arrays(**content)
    everything = np.arange(len(arrays.rows))
    report = summarise(arrays, everything, dropped=notes["dropped"], untrained=notes["untrained"])
    checksums = json.dumps(cache.checksums({"tokens": arrays.tokens, "mask": arrays.mask}))
    fingerprint = hashlib.sha256(checksums.encode()).hexdigest()
    prepared = Prepared(what, arrays, sources, everything, report, fingerprint)
    _refuse_cuts(cfg, prepared)
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


@dataclass(slots=True)
class _Builder:
    """Grows the arrays unit by unit, cutting what is too long."""

    max_length: int
    policy: str
    tokens: list[np.ndarray] = field(default_factory=list)
    mask: list[np.ndarray] = field(default_factory=list)
    num_tokens: int = 0
    columns: dict[str, array] = field(
        default_factory=lambda: {
            name: array("q")
            for name in ("sample_ends", "unit_ends", "rows", "sources", "places", "cut", "full_lengths")
        }
    )
    dropped: int = 0
    untrained: int = 0

    def add(self, place: tuple[int, int, int], samples: list[Encoded]) -> None:
        """Add a unit. `place`: its row over all sources, its source, its number there.

        Raises Malformed when the row trains nothing, or is too long and `error` is the policy.
        """
        longest = max(len(sample.tokens) for sample in samples)
        if not any(sample.mask.any() for sample in samples):
            text = f"no token of the row is trained ({longest} tokens); give it an answer or remove the row"
            raise Malformed("nothing to train", text)
        too_long = longest > self.max_length
        if too_long and self.policy == "error":
            text = f"the row has {longest:,} tokens, but data.max_length is {self.max_length:,}"
            raise Malformed("too long", f"{text}; raise it, shorten the row, or set data.on_too_long")
        self.columns["full_lengths"].append(longest)
        kept = [Encoded(sample.tokens[: self.max_length], sample.mask[: self.max_length]) for sample in samples]
        kept = [sample for sample in kept if sample.mask.any()]
        if too_long and (self.policy == "drop" or not kept):
            self.dropped += 1
            self.untrained += self.policy != "drop"
            return
        for sample in kept:
            self.tokens.append(sample.tokens)
            self.mask.append(sample.mask)
            self.num_tokens += len(sample.tokens)
            self.columns["sample_ends"].append(self.num_tokens)
        self.columns["unit_ends"].append(len(self.columns["sample_ends"]))
        self.columns["cut"].append(too_long)
        for name, value in zip(("rows", "sources", "places"), place, strict=True):
            self.columns[name].append(value)

    def arrays(self) -> dict[str, np.ndarray]:
        columns = {name: np.array(column, dtype=np.int64) for name, column in self.columns.items()}
        columns["cut"] = columns["cut"].astype(np.bool_)
        return {"tokens": np.concatenate(self.tokens), "mask": np.concatenate(self.mask), **columns}


def _build(
    cfg: DataConfig, sources: tuple[Source, ...], tokenizer: PreTrainedTokenizerBase, progress: Progress | None
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    problems = Problems()
    renderer, encoder = Renderer(cfg, tokenizer), Encoder(tokenizer)
    builder = _Builder(cfg.max_length, cfg.on_too_long)
    numbers = {source: number for number, source in enumerate(sources)}
    items = read_items(sources, cfg.columns, SFT_SHAPES, problems)
    for placed, samples in tokenise(items, renderer.sequences, encoder, problems, progress):
        try:
            builder.add((placed.index, numbers[placed.row.source], placed.row.number), samples)
        except Malformed as fault:
            problems.add(fault.kind, f"{placed.row.place}: {fault}")
    problems.raise_any()
    if not builder.tokens:
        longest = min(builder.columns["full_lengths"])
        raise DataError(
            f"none of {builder.dropped:,} rows is left: all are longer than data.max_length ({cfg.max_length:,} "
            f"tokens), and dropped or left with nothing to train; the shortest has {longest:,}; raise it"
        )
    return builder.arrays(), {"dropped": builder.dropped, "untrained": builder.untrained}


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
