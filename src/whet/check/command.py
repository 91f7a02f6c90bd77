"""`whet check`: a configuration examined in one pass, with all that is wrong and all that is odd."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from whet.check.examine import Examined, examine
from whet.check.report import show
from whet.config.loader import inspect


def check(
    path: str | None,
    flags: Sequence[str],
    console: Console,
    *,
    rows: int,
    then: Callable[[Examined], bool] | None = None,
) -> bool:
    """Examine a configuration file and print what was found. Returns whether a run may begin.

    Warnings do not keep a run from beginning. Of each part of the data the first `rows` are shown. `then` is called
    with what was found if the method is known, and has a say in the answer.
    """
    inspected = inspect(None, path, flags)
    errors = list(inspected.problems)
    with warnings_of_whet() as warnings:
        found = None if inspected.config is None else examine(inspected.config)
    if found is None:
        # Too little of the configuration is left to look at anything else.
        for error in errors:
            console.print(f"- {error}", markup=False, soft_wrap=True)
        return False
    errors += untold(found, errors)
    show(found, errors, [*inspected.notes, *warnings], console, rows=rows)
    agreed = then is None or found.method is None or then(found)
    return not errors and agreed


def untold(found: Examined, told: Sequence[str]) -> list[str]:
    """The errors of the examination, without those about a setting of which the same has been told."""
    begun = {_subject(text) for text in told}
    return [str(error) for error in found.errors.errors if _subject(str(error)) not in begun]


def _subject(text: str) -> tuple[str, ...]:
    """A setting and the verb after it, as in `rollout.group_size is`."""
    return tuple(text.split()[:2])


class _Taking(logging.Handler):
    """Keeps the text of every message, each once."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() not in self.texts:
            self.texts.append(record.getMessage())


@contextmanager
def warnings_of_whet() -> Iterator[list[str]]:
    """Takes the messages of our logger, and keeps its warnings."""
    logger, taking = logging.getLogger("whet"), _Taking(logging.WARNING)
    before, logger.handlers = logger.handlers, [taking]
    propagate, logger.propagate = logger.propagate, False
    try:
        yield taking.texts
    finally:
        logger.handlers, logger.propagate = before, propagate
