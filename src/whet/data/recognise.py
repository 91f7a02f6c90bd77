"""Which shape the rows of a file have, by their columns; and the rows in the form of the task."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from whet.data.pairs import PAIR_SHAPES, SIDES, UNPAIRED_SHAPES
from whet.data.problems import Malformed, Problems
from whet.data.rows import Row, Source, read_rows
from whet.data.shapes import PROMPT_SHAPES, SFT_SHAPES, Fields, Shape, Task
from whet.errors import DataError

Item = TypeVar("Item")

SHAPES: dict[Task, tuple[Shape[Any], ...]] = {
    "sft": SFT_SHAPES,
    "preference": PAIR_SHAPES,
    "reward": PAIR_SHAPES,
    # A pair is a desirable and an undesirable completion.
    "unpaired": (*UNPAIRED_SHAPES, *PAIR_SHAPES),
}
NAMES = tuple(
    dict.fromkeys(
        name
        for shape in (*SFT_SHAPES, *PROMPT_SHAPES, *UNPAIRED_SHAPES, *PAIR_SHAPES)
        for name in (*shape.required, *shape.optional)
    )
)
"""Every name that `data.columns` may map."""


@dataclass(frozen=True, slots=True)
class Placed(Generic[Item]):
    """An item with its row: `index` over all sources, and where it stands."""

    index: int
    row: Row
    item: Item


def read_items(
    sources: Sequence[Source], columns: Mapping[str, str], shapes: Sequence[Shape[Item]], problems: Problems
) -> Iterator[Placed[Item]]:
    """Every row of every source in the form of the task. Rows that cannot be used are added to `problems`.

    The first row of each source decides its shape. Raises DataError when no shape fits.
    """
    index = 0
    for source in sources:
        shape: Shape[Item] | None = None
        for row in read_rows(source, problems):
            if shape is None:
                shape = recognise(row.values, columns, shapes, source.path)
                _require_prompt(row.values, columns, shape, source.path)
            try:
                item = shape.read(Fields(row.values, columns))
            except Malformed as fault:
                problems.add(fault.kind, f"{row.place}: {fault}")
            else:
                yield Placed(index, row, item)
            index += 1


def recognise(
    found: Collection[str], columns: Mapping[str, str], shapes: Sequence[Shape[Item]], file: str
) -> Shape[Item]:
    """The first shape whose columns are among those `found` in the file, under the names `columns` gives them.

    Raises DataError for a name of ours that no task knows, for a mapped column that the file does not
    have, and when no shape fits; the error lists the columns found.
    """
    for ours in columns:
        if ours not in NAMES:
            near = difflib.get_close_matches(ours, NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(NAMES)}"
            raise DataError(f"data.columns maps {ours!r}, which is no column of ours; {hint}")
    used = {ours for ours in columns if any(ours in (*shape.required, *shape.optional) for shape in shapes)}
    for ours in sorted(used):
        if columns[ours] not in found:
            near = difflib.get_close_matches(columns[ours], found, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(found) or "none"
            raise DataError(f"data.columns maps {ours} to {columns[ours]!r}, but {file} has the columns {listed}{hint}")
    taken = set(columns.values())
    available = used | {name for name in found if name not in taken and name not in columns}
    for shape in shapes:
        if shape.fits(available, used):
            return shape
    raise DataError(_no_shape(found, used, available, shapes, file))


_SYNONYMS = {
    "prompt": ("prompt", "question", "query", "instruction", "input", "problem", "source"),
    "response": ("response", "completion", "answer", "output", "solution", "target", "reply"),
    "messages": ("messages", "conversation", "dialogue", "dialog", "chat", "turns"),
    "text": ("text", "content", "body", "document"),
    "chosen": ("chosen", "preferred", "accepted", "winner", "better", "chosen_response", "response_chosen", "pos"),
    "rejected": ("rejected", "dispreferred", "loser", "worse", "rejected_response", "response_rejected", "neg"),
    "completion": ("completion", "response", "answer", "output", "solution", "reply"),
    "label": ("label", "kto_tag", "is_correct", "correct", "thumbs_up", "desirable", "feedback"),
}


# What rows of other shapes are good for: said to who gives them to the wrong method.
_OTHERWISE = (
    (PAIR_SHAPES, "pairs of a chosen and a rejected completion, which dpo and its relatives, kto, bco and reward read"),
    (
        UNPAIRED_SHAPES,
        "single completions with a label, which kto and bco read; pairs have chosen and rejected instead",
    ),
    (SFT_SHAPES, "completions to imitate, which sft reads; a preference has chosen and rejected, or a label"),
)


_PROMPTS = ("prompt", "question", "query", "instruction", "input", "problem")


def _require_prompt(values: Mapping[str, Any], columns: Mapping[str, str], shape: Shape, file: str) -> None:
    """Raise DataError for texts that are read as holding their prompt, beside a column that is likely to hold it."""
    fields = Fields(values, columns)
    texts = [fields.get(side) for side in SIDES]
    if shape.required != SIDES or columns.keys() >= set(SIDES) or not all(isinstance(text, str) for text in texts):
        return
    for name, value in values.items():
        if name.lower() in _PROMPTS and not all(text.startswith(str(value)) for text in texts):
            raise DataError(
                f"{file} has {name!r} beside chosen and rejected, which do not begin with it: map it with data.columns "
                f"{{prompt: {name}}}, or, where both hold their prompt, say {{chosen: chosen, rejected: rejected}}"
            )


def _no_shape(found: Collection[str], used: set[str], available: set[str], shapes: Sequence[Shape], file: str) -> str:
    """No shape fits: what the file has, what would fit, what else it is good for, or a mapping to try."""
    wanted = " · ".join(" + ".join(shape.required) for shape in shapes)
    mapped = f" (of which data.columns maps {', '.join(sorted(used))})" if used else ""
    mapping = _guess(found, shapes)
    for others, meaning in _OTHERWISE if mapping is None else ():
        if any(shape not in shapes and shape.fits(available, used) for shape in others):
            return f"{file} has the columns {', '.join(found)}: {meaning}; expected {wanted}"
    if mapping is None:
        first = next((shape for shape in shapes if "prompt" in shape.required), shapes[0])
        mapping = {ours: _likely(ours, found) or f"your_{ours}_column" for ours in first.required}
    example = ", ".join(f"{ours}: {theirs}" for ours, theirs in mapping.items())
    return (
        f"{file} has the columns {', '.join(found) or 'none'}{mapped}; expected {wanted}; "
        f"name yours in data.columns, as in {{{example}}}"
    )


def _guess(found: Collection[str], shapes: Sequence[Shape]) -> dict[str, str] | None:
    """Our names -> the file's, for the first shape that its column names suggest."""
    for shape in shapes:
        likely = {ours: _likely(ours, found) for ours in shape.required}
        if all(likely.values()) and len(set(likely.values())) == len(likely):
            return {ours: str(theirs) for ours, theirs in likely.items()}
    return None


def _likely(ours: str, found: Collection[str]) -> str | None:
    """The column of the file that is likely to hold what we call `ours`."""
    return next((name for word in _SYNONYMS.get(ours, ()) for name in found if name.lower() == word), None)
