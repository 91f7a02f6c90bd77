"""What the environment of a process says of those that it trains with. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping

from whet.errors import ClusterError

RANK, SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
ADDRESS, PORT = "MASTER_ADDR", "MASTER_PORT"
"""What whoever starts the processes (our launcher, torchrun, Ray) puts into the environment of each."""


def size_in_environment(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many processes this one was started among; None where it was started alone.

    Raises ClusterError for an environment that says only half of it.
    """
    given = [name for name in (RANK, SIZE, ADDRESS, PORT) if name in environment]
    if not {RANK, SIZE} & {*given}:
        return None
    if missing := [name for name in (RANK, SIZE, ADDRESS, PORT) if name not in given]:
        raise ClusterError(
            f"the environment has {' and '.join(given)} but not {' and '.join(missing)}; start with torchrun, which "
            "sets all of them, or unset what is there"
        )
    return int(environment[SIZE])
