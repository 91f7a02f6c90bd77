"""Where a run spreads over several processes: who starts them, who leads, who follows."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from whet.config.parallel_rules import is_spread
from whet.config.run import RunConfig
from whet.errors import ConfigError, WhetError
from whet.ranks.crew import Crew, Follower
from whet.ranks.environment import ADDRESS, PORT, RANK, SIZE
from whet.ranks.layout import Layout
from whet.ranks.world import World
from whet.roles import load_part

logger = logging.getLogger(__name__)


@contextmanager
def crew_of(config: RunConfig) -> Iterator[Crew | None]:
    """The ranks of a run, led from here; None for one that is not spread.

    They go home at the end; where it ends with an error, they end with this process.
    """
    if not is_spread(config):
        yield None
        return
    crew = Crew(_join(config), Layout.of(config.backend, config.cluster.size))
    try:
        yield crew
    except BaseException as error:
        crew.end(error)
        raise
    crew.end()


def follow(config: RunConfig) -> int:
    """Be one of the other ranks until the leader ends the run. Returns the exit code."""
    logging.getLogger("whet").setLevel(logging.WARNING)  # the leader tells what all do
    world = _join(config)

    def load(told: tuple[RunConfig, bool]) -> Any:
        settings, train = told
        return load_part(settings, train, Layout.of(settings.backend, world.size))

    try:
        Follower(world).follow(load)
    except WhetError:
        raise
    except Exception:  # the leader has been told, and tells it
        return 1
    return 0


def _join(config: RunConfig) -> World:
    if SIZE not in os.environ:
        if config.cluster.size > 1:
            raise ConfigError(
                f"cluster.num_processes is {config.cluster.size}, and this process is alone; start the run by the "
                "command whet, which starts the others, or by torchrun"
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {RANK: "0", SIZE: "1", ADDRESS: "127.0.0.1", PORT: str(port)}
    return World.join(start_timeout_s=config.cluster.start_timeout_s, timeout_s=config.backend.timeout_s)
