"""Rows: what was selected, in the shapes that training reads, with where it comes from beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from whet.config.sample import SampleConfig
from whet.sample.journal import Completed
from whet.sample.select import Selection, passes
from whet.types import Message, Prompt


def rows_of(prompt: Prompt, group: str, selection: Selection, config: SampleConfig) -> Iterator[dict[str, Any]]:
    """One row for each completion or pair that is taken.

    `best` and `all`: `prompt`, `response`; `pairs`: `prompt`, `chosen`, `rejected`, `margin`; `labels`: `prompt`,
    `completion`, `label`. Of a prompt of messages, answers are messages too, so that only they are trained.
    Beside these stand `group`, `index`, `score` (of a pair two each), `rewards` where there are several, and
    `metadata` with the prompt's label.
    """
    for taken in selection.taken:
        yield {**_asked(prompt), **_answered(prompt, taken, config), "group": group, **_origin(taken), **_known(prompt)}


def _asked(prompt: Prompt) -> dict[str, Any]:
    tools = prompt.metadata.get("tools")
    return {"prompt": prompt.content, **({"tools": tools} if tools else {})}


def _answered(prompt: Prompt, taken: tuple[Completed, ...], config: SampleConfig) -> dict[str, Any]:
    if len(taken) == 2:
        better, worse = taken
        assert better.score is not None and worse.score is not None, "what is taken has a score"
        sides = {"chosen": _answer(prompt, better), "rejected": _answer(prompt, worse)}
        return {**sides, "margin": better.score - worse.score}
    (one,) = taken
    if config.select == "labels":
        return {"completion": _answer(prompt, one), "label": passes(one, config)}
    return {"response": _answer(prompt, one)}


def _answer(prompt: Prompt, one: Completed) -> str | list[Message]:
    return one.response if isinstance(prompt.content, str) else [{"role": "assistant", "content": one.response}]


def _origin(taken: tuple[Completed, ...]) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {
        "index": [one.index for one in taken],
        "score": [one.score for one in taken],
        "rewards": [dict(one.rewards) for one in taken] if any(len(one.rewards) > 1 for one in taken) else [],
    }
    return {name: values if len(taken) > 1 else values[0] for name, values in columns.items() if values}


def _known(prompt: Prompt) -> dict[str, Mapping[str, Any]]:
    """What the prompt's row said of it beside the prompt."""
    metadata = {name: value for name, value in prompt.metadata.items() if name != "tools"}
    if prompt.label is not None:
        metadata["label"] = prompt.label
    return {"metadata": metadata} if metadata else {}
