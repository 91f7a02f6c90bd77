"""What becomes of a run when one of its processes ends: it is over, or it is begun again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from whet.errors import ClusterError

logger = logging.getLogger(__name__)

USERS, INTERRUPTED, LOST = 2, 130, ClusterError.exit_code
"""Exit codes of a process: what a user can mend, an interrupt, another process that was lost."""
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 60.0
"""Seconds before the run is begun again, doubled each time."""


@dataclass
class Outcome:
    """How the processes of one attempt ended: their exit codes by rank, and those that were lost, in the order in which
    this was seen."""

    codes: dict[int, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def is_over(self) -> bool:
        """Whether there is nothing that another attempt would mend."""
        return self.interrupted or self.codes.get(0) in (0, INTERRUPTED) or USERS in self.codes.values()

    @property
    def code(self) -> int:
        """The exit code of the whole."""
        if self.interrupted:
            return self.codes.get(0, INTERRUPTED)
        if USERS in self.codes.values():
            return USERS
        own = self.codes.get(0)
        return LOST if own is None or own < 0 else own

    def __str__(self) -> str:
        return "; ".join(self.lost) or f"rank 0 ended with exit code {self.codes.get(0)}"


def supervise(attempt: Callable[[int], Outcome], max_restarts: int, wait: Callable[[float], None] = time.sleep) -> int:
    """Begin a run, and begin it again for as long as processes are lost, `max_restarts` times at most.

    `attempt` is given how many came before it. Returns the exit code.
    """
    for restarts in range(max_restarts + 1):
        outcome = attempt(restarts)
        if outcome.is_over:
            return outcome.code
        if restarts == max_restarts:
            logger.error("%s; cluster.max_restarts is %d, so that this is the end of the run", outcome, max_restarts)
            return outcome.code
        pause = min(FIRST_WAIT_S * 2**restarts, LONGEST_WAIT_S)
        logger.warning(
            "%s; the run begins again from its last checkpoint in %g s (restart %d of %d)",
            *(outcome, pause, restarts + 1, max_restarts),
        )
        wait(pause)
    raise AssertionError("the last attempt returns")
