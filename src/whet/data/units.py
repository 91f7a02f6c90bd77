"""Rows as units before they are cut: which sequences belong together, where their prompt ends, how they are judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from whet.data.encode import Encoded, Encoder
from whet.data.pairs import Judged, Pair
from whet.data.problems import Malformed, Problems
from whet.data.recognise import Placed
from whet.data.shapes import Task, Text


@dataclass(frozen=True, slots=True)
class Draft:
    """Sequences that belong together. `labels`, one for each: 1 chosen or desirable, 0 rejected or undesirable.

    `prompt`: so many tokens at the start are the prompt, the same in all of them.
    """

    samples: tuple[Encoded, ...]
    prompt: int
    labels: tuple[float, ...] = ()
    margin: float | None = None

    @property
    def identical(self) -> bool:
        """Whether it is a pair of twice the same completion, which nothing can be learned from."""
        return len(self.labels) == 2 and np.array_equal(self.samples[0].tokens, self.samples[1].tokens)


def drafts(task: Task, item: Any, samples: Sequence[Encoded], encoder: Encoder) -> list[Draft]:
    """The units of one row: one, or for the task `unpaired` two of a pair, the chosen and the rejected; none of a
    pair that says the same twice.

    Sequences that are judged end with their last trained token. Raises Malformed for a preference between
    completions of different prompts.
    """
    if isinstance(item, Judged):
        return [Draft((_ended(samples[0]),), samples[0].prompt, (float(item.label),))]
    if not isinstance(item, Pair):
        return [Draft(tuple(samples), samples[0].prompt)]
    chosen, rejected = (_ended(sample) for sample in samples)
    pair = _pair(task, item, chosen, rejected, encoder)
    if task != "unpaired":
        return [pair]
    if pair.identical:
        return []
    return [Draft((sample,), pair.prompt, (label,)) for sample, label in zip(pair.samples, pair.labels, strict=True)]


def _pair(task: Task, item: Pair, chosen: Encoded, rejected: Encoded, encoder: Encoder) -> Draft:
    shared = encoder.shared(chosen, rejected)
    if isinstance(item.chosen, Text):
        # Whole texts: what their tokens have in common is the prompt, cut where it cuts neither's tokens.
        chosen, rejected = _prompted(chosen, shared), _prompted(rejected, shared)
    different = chosen.prompt != rejected.prompt or chosen.prompt > shared
    if different and task != "reward":
        text = "chosen and rejected answer different prompts: they differ before the first answer"
        raise Malformed("different prompts", f"{text}; give both the same messages up to there, or remove the row")
    prompt = min(shared, chosen.prompt, rejected.prompt)
    return Draft((chosen, rejected), prompt, (1.0, 0.0), item.margin)


def _ended(sample: Encoded) -> Encoded:
    """The sequence up to its last trained token: what a template writes behind the end of a turn is not scored."""
    end = int(np.flatnonzero(sample.mask).max(initial=-1)) + 1
    return Encoded(sample.tokens[:end], sample.mask[:end], sample.prompt) if end else sample


def _prompted(sample: Encoded, prompt: int) -> Encoded:
    """The sequence with its first `prompt` tokens untrained."""
    prompt = min(prompt, len(sample.tokens) - 1)
    return Encoded(sample.tokens, sample.mask & (np.arange(len(sample.mask)) >= prompt), prompt)


def require_margins(items: Iterator[Placed[Any]], problems: Problems) -> Iterator[Placed[Any]]:
    """The items as they come; rows that have a margin where the first pair has none, or none where it has one, are
    added to `problems`."""
    first: Placed[Any] | None = None
    for placed in items:
        if isinstance(placed.item, Pair):
            first = first or placed
            given, expected = placed.item.margin is not None, first.item.margin is not None
            if given != expected:
                has, had = ("a margin" if each else "no margin" for each in (given, expected))
                text = f"the row has {has}, but the first ({first.row.place}) has {had}"
                problems.add("uneven margins", f"{placed.row.place}: {text}; give one to all rows or to none")
        yield placed
