"""Leading and following: rank 0 says what all ranks do with their part of a model, and hears what came of it."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whet.checkpoints.state import load_rng, save_rng
from whet.errors import ClusterError, WhetError
from whet.ranks.layout import Layout
from whet.ranks.share import Share
from whet.ranks.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """Call `method` of the backend in `role`; with `scatters`, each rank's share comes first among the arguments, and
    with `streams`, what it yields is run through. Without a method the run is over."""

    role: str = ""
    method: str = ""
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    scatters: bool = False
    streams: bool = False

    def __str__(self) -> str:
        return f"{self.method} of the {self.role}"


class Crew:
    """The leader's hold on all ranks, itself among them.

    One command at a time, from whatever thread; a rank that fails ends the run with an error that names it.
    """

    def __init__(self, world: World, layout: Layout) -> None:
        self.world, self.layout = world, layout
        self.backends: MutableMapping[str, Any] = {}
        """What the leader's own rank runs, by role."""
        self.backends["rank"] = RankState(world.rank, self.backends)
        self._lock = threading.Lock()

    def call(
        self, role: str, method: str, *arguments: Any, shares: Sequence[Share] | None = None, **options: Any
    ) -> list[Any]:
        """What the method returned on each rank. With `shares`, one for each data rank, a rank works on its own."""
        command = Command(role, method, arguments, options, scatters=shares is not None)
        with self._lock, self._together(command):
            self.world.command(command)
            parts = None if shares is None else self._parts(shares)
            own = self._run(command, parts)
            return self.world.gather(own)

    def stream(self, role: str, method: str, *arguments: Any, **options: Any) -> Iterator[Any]:
        """What the method yields on the leader's rank, while the others run along. It runs to its end even if whoever
        reads stops."""
        command = Command(role, method, arguments, options, streams=True)
        with self._lock, self._together(command):
            self.world.command(command)
            stream = getattr(self.backends[role], method)(*arguments, **options)
            try:
                yield from stream
            finally:
                for _ in stream:  # or the others would wait for the rest
                    pass
                self.world.gather(None)

    def release(self, role: str) -> None:
        """Every rank lets go of its part of the model in this role."""
        self.call("rank", "release", role)

    @contextmanager
    def loading(self, what: Any) -> Iterator[None]:
        """The first thing that all do: each loads its part of what followers are told here."""
        self.world.command(what)
        with self._together("the loading of the models"):
            yield

    def end(self, error: BaseException | None = None) -> None:
        """Send the others home; after an error, those that still listen."""
        if error is None:
            self.world.command(Command())
            self.world.leave()
            return
        self.world.watch.failed(f"{type(error).__name__}: {error}")
        with suppress(RuntimeError):
            self.world.command(Command())

    def _parts(self, shares: Sequence[Share]) -> list[Share]:
        return [shares[self.layout.data_rank(rank)] for rank in range(self.world.size)]

    def _run(self, command: Command, parts: Sequence[Share] | None) -> Any:
        first = () if parts is None else (self.world.scatter(parts),)
        return run(command, self.backends, first)

    @contextmanager
    def _together(self, command: object) -> Iterator[None]:
        """What the ranks do together has a limit, and a failure of one is told as such."""
        watch = self.world.watch
        watch.begin(str(command))
        try:
            yield
        except WhetError:
            raise
        except RuntimeError as error:  # PyTorch's own way of saying that a collective did not work
            said = str(error).splitlines()[0][:200]
            raise ClusterError(f"{command} failed: {watch.explain()} ({said})") from error
        finally:
            watch.end()


class Follower:
    """What every rank but the first is: its part of each model, and obedience."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.backends: MutableMapping[str, Any] = {}
        self.backends["rank"] = RankState(world.rank, self.backends)

    def follow(self, load: Callable[[Any], Mapping[str, Any]]) -> None:
        """Load what the leader says, then do what it says until the run is over. Raises ClusterError when it is gone.

        `load` makes this rank's part of each model, by role, of what `Crew.loading` was given.
        """
        words = self.world.next_command()
        if not (isinstance(words, Command) and not words.method):
            with self.at("the loading of the models"):
                self.backends.update(load(words))
            self._obey()
        self.world.leave()

    def _obey(self) -> None:
        while (command := self.world.next_command()).method:
            with self.at(str(command)):
                first = (self.world.scatter(None),) if command.scatters else ()
                self.world.gather(run(command, self.backends, first))

    @contextmanager
    def at(self, what: str) -> Iterator[None]:
        """Something that all do together; a failure is left as word for the leader."""
        self.world.watch.begin(what)
        try:
            yield
        except Exception as error:
            told = str(error) if isinstance(error, WhetError) else "".join(traceback.format_exception(error))
            self.world.watch.failed(told)
            raise
        finally:
            self.world.watch.end()


def run(command: Command, backends: Mapping[str, Any], first: tuple[Any, ...]) -> Any:
    """What a command asks of this rank."""
    found = getattr(backends[command.role], command.method)(*first, *command.arguments, **command.options)
    if command.streams:
        for _ in found:
            pass
        return None
    return found


class RankState:
    """What belongs to a rank whatever its models are: its random generators, and which models it holds."""

    def __init__(self, rank: int, held: MutableMapping[str, Any]) -> None:
        self.rank, self.held = rank, held

    def save_rng(self, folder: Path) -> None:
        """Beside those of the leader, which are saved with the run."""
        if self.rank:
            (own := folder / f"rank-{self.rank}").mkdir(exist_ok=True)
            save_rng(own)

    def load_rng(self, folder: Path) -> None:
        """As they were saved; with more ranks than then, the new ones keep what they were seeded with."""
        own = folder / f"rank-{self.rank}"
        if self.rank and own.is_dir():
            load_rng(own)

    def release(self, role: str) -> None:
        self.held.pop(role, None)

    def move_towards(self, role: str, other: str, share: float) -> None:
        """Each weight of the model in `role` becomes a little more like that of the other."""
        self.held[role].move_towards(self.held[other], share)
