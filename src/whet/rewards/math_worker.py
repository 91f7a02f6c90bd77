"""A process of its own that compares two mathematical expressions through math-verify, for rewards/math.py.

It reads one JSON question per line and answers with one JSON line. It imports nothing of whet, so
that it starts fast and holds no torch. Parsing may take for ever or all memory; a process can be
killed where a thread cannot, and math-verify's own limits work in main threads only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from latex2sympy2_extended.sets import FiniteSet
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Tuple
from sympy.core.relational import Relational

MEMORY_LIMIT_BYTES = 4 << 30


def expression(text: str, ordered: bool) -> list[Any]:
    """What math-verify makes of one answer; only its LaTeX reader is used, for the other one evaluates Python."""
    parsed = parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)
    if ordered and "," in text and "\\{" not in text:
        parsed = [in_order(item) for item in parsed]
    return parsed


def in_order(item: Any) -> Any:
    """A list written without set braces as a tuple; named values (`x=1, y=2`) have no order."""
    if not isinstance(item, FiniteSet) or any(isinstance(element, Relational) for element in item._unsorted_args):
        return item
    return Tuple(*item._unsorted_args)


def equal(label: str, answer: str, ordered: bool) -> bool:
    """Whether an answer is mathematically equal to a label. What cannot be read is not equal."""
    try:
        return bool(verify(expression(label, ordered), expression(answer, ordered), timeout_seconds=None))
    except Exception:  # sympy raises nearly anything on nearly mathematical text
        return False


def main() -> None:
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # An interrupt is for the run, which may yet want to grade its last step; the end of stdin is for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ValueError, OSError):  # not every system can limit it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    equal("\\frac{1}{2}", "0.5", True)  # the first question is slow: grammars are built
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        # Without a handler the alarm ends the process, in the middle of anything.
        signal.setitimer(signal.ITIMER_REAL, question["timeout_s"])
        verdict = equal(question["label"], question["answer"], question["ordered"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=answers, flush=True)


if __name__ == "__main__":
    main()
