"""Prompts to sample from: rows of a prompt file as tokens, with label and metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from whet.config.data import DataConfig
from whet.data.encode import Encoded, Encoder
from whet.data.pieces import Rendered
from whet.data.prepared import held_out, refuse_share, require_two_sides
from whet.data.problems import Problems
from whet.data.recognise import read_items
from whet.data.rows import parse_sources
from whet.data.shapes import PROMPT_SHAPES, PromptRow
from whet.data.template import Renderer
from whet.data.tokenise import Progress, tokenise
from whet.errors import DataError, Gathering
from whet.types import Message, Prompt


@dataclass(frozen=True, slots=True)
class PromptReport:
    """`dropped` of `rows` are longer than `data.max_prompt_length`; `longest` counts tokens, those included."""

    rows: int
    tokens: int
    longest: int
    dropped: int

    def __str__(self) -> str:
        return (
            f"{self.rows:,} prompts, {self.tokens:,} tokens; longest {self.longest:,}; "
            f"dropped {self.dropped:,} ({self.dropped / self.rows:.1%})"
        )


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a data set in the order of their rows, and what became of the rows."""

    prompts: tuple[Prompt, ...]
    report: PromptReport

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: int) -> Prompt:
        return self.prompts[i]

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that was kept."""
        return max(len(prompt.tokens) for prompt in self.prompts)

    def hold_out(self, share: float, seed: int) -> tuple[Prompts, Prompts]:
        """Two parts, the second with about `share` of the prompts; see `Prepared.hold_out`."""
        held = [held_out(np.array(prompt.tokens, dtype=np.int32).tobytes(), share, seed) for prompt in self.prompts]
        require_two_sides(held, share)
        kept = tuple(prompt for prompt, out in zip(self.prompts, held, strict=True) if not out)
        rest = tuple(
            replace(prompt, id=f"eval/{prompt.id.rpartition('/')[2]}")
            for prompt, out in zip(self.prompts, held, strict=True)
            if out
        )
        lengths = [len(prompt.tokens) for prompt in rest]
        report = replace(self.report, rows=self.report.rows - len(rest), tokens=self.report.tokens - sum(lengths))
        return Prompts(kept, report), Prompts(rest, _report(rest, lengths))


def prepare_prompts(
    cfg: DataConfig,
    paths: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    what: str = "train",
    tools: list[dict[str, Any]] | None = None,
    progress: Progress | None = None,
    errors: Gathering | None = None,
) -> Prompts:
    """The prompts of `paths`, tokenised: messages through the chat template, up to where the answer begins.

    Plain text stands as it is (`data.prompt_template` around it), or as a user message when `data.chat`
    is `always`. `tools` of a row, or else these, are rendered and kept in the prompt's metadata. Prompts longer than
    `data.max_prompt_length` are dropped and counted. Plain text with a system message is kept as two messages.
    Raises DataError for files and rows that cannot be used, all at once, and when more than
    `data.max_cut_share` of the rows is dropped; ModelError when the tokenizer lacks a chat template.
    With `errors`, what is wrong with rows goes there, and the other prompts are returned.
    """
    problems = Problems()
    renderer, encoder = Renderer(cfg, tokenizer), Encoder(tokenizer)
    items = read_items(parse_sources(paths), cfg.columns, PROMPT_SHAPES, problems)

    def render(row: PromptRow) -> list[Rendered]:
        return [renderer.prompt(_with_tools(row, tools))]

    kept: list[Prompt] = []
    lengths: list[int] = []
    for placed, (encoded,) in tokenise(items, render, encoder, problems, progress, go_on=errors is not None):
        if len(encoded.tokens) == 0:
            problems.add("empty", f"{placed.row.place}: the prompt has no tokens; fill it in or remove the row")
            continue
        lengths.append(len(encoded.tokens))
        if cfg.max_prompt_length is None or lengths[-1] <= cfg.max_prompt_length:
            row = _with_tools(placed.item, tools)
            kept.append(_prompt(f"{what}/{placed.index}", row, renderer.said(row), encoded))
    with Gathering.of(errors) as errors:
        with errors.going_on():
            problems.raise_any()
        report = _report(kept, lengths)
        with errors.going_on():
            _refuse_long(cfg, report)
        if not kept and errors.errors and not report.rows:
            raise errors.errors[-1]  # no row could be used at all
    if not kept:
        raise DataError(f"all {report.rows:,} prompts are longer than data.max_prompt_length; raise it")
    return Prompts(tuple(kept), report)


def _with_tools(row: PromptRow, tools: list[dict[str, Any]] | None) -> PromptRow:
    return row if row.tools or not tools else replace(row, tools=tools)


def _refuse_long(cfg: DataConfig, report: PromptReport) -> None:
    refuse_share(
        report.dropped,
        report.rows,
        cfg,
        what=f"are dropped, as their prompts are longer than data.max_prompt_length ({cfg.max_prompt_length} tokens); "
        f"the longest has {report.longest:,}",
        remedy="raise it",
    )


def _prompt(name: str, row: PromptRow, content: str | list[Message], encoded: Encoded) -> Prompt:
    metadata = {**row.metadata, **({"tools": row.tools} if row.tools else {})}
    return Prompt(name, tuple(encoded.tokens.tolist()), content, row.label, metadata)


def _report(kept: Sequence[Prompt], lengths: Sequence[int]) -> PromptReport:
    tokens = sum(len(prompt.tokens) for prompt in kept)
    return PromptReport(len(lengths), tokens, max(lengths, default=0), len(lengths) - len(kept))
