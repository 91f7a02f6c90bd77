"""Rows of any task become tokens, a chunk at a time; what is wrong with them is collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar

from whet.data.encode import Encoded, Encoder
from whet.data.pieces import Rendered
from whet.data.problems import Malformed, Problems
from whet.data.recognise import Placed

Item = TypeVar("Item")
Progress = Callable[[int], None]
"""Called now and then with the number of rows done."""

_CHUNK = 512


def tokenise(
    items: Iterator[Placed[Item]],
    render: Callable[[Item], list[Rendered]],
    encoder: Encoder,
    problems: Problems,
    progress: Progress | None = None,
    *,
    go_on: bool = False,
) -> Iterator[tuple[Placed[Item], list[Encoded]]]:
    """Each item with its sequences as tokens and masks, in order.

    Once `problems` holds any, the items that follow are still rendered, to find what is wrong with them,
    but nothing is tokenised or yielded, unless `go_on`.
    """
    done = 0
    while chunk := list(islice(items, _CHUNK)):
        rendered = []
        for placed in chunk:
            try:
                rendered.append((placed, render(placed.item)))
            except Malformed as fault:
                problems.add(fault.kind, f"{placed.row.place}: {fault}")
        if go_on or not problems:
            yield from _encode(rendered, encoder, problems)
        done += len(chunk)
        if progress:
            progress(done)


def _encode(
    rendered: list[tuple[Placed[Item], list[Rendered]]], encoder: Encoder, problems: Problems
) -> Iterator[tuple[Placed[Item], list[Encoded]]]:
    encoded = iter(encoder.encode([sequence for _, sequences in rendered for sequence in sequences]))
    for placed, sequences in rendered:
        samples = list(islice(encoded, len(sequences)))
        try:
            for sample in samples:
                encoder.require_single_start(sample)
        except Malformed as fault:
            problems.add(fault.kind, f"{placed.row.place}: {fault}")
        else:
            yield placed, samples
