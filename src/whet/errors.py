"""What can go wrong for a user, by kind. Every message names the item, its value and the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class WhetError(Exception):
    """Base of all errors that whet raises for its users. The command line prints them and exits with `exit_code`."""

    exit_code = 2


class ConfigError(WhetError, ValueError):
    """A setting is unknown, has a wrong value, or does not go with another."""


class DataError(WhetError, ValueError):
    """A data file or a row of it cannot be used."""


class ModelError(WhetError, ValueError):
    """A model or tokenizer cannot be loaded, or does not do what the run needs."""


class EngineError(WhetError, RuntimeError):
    """An inference engine failed or did not answer in time."""


class RewardError(WhetError, RuntimeError):
    """A reward function could not be found, failed for every episode, or left nothing to learn from."""


class CheckpointError(WhetError, RuntimeError):
    """A checkpoint cannot be written, found or read."""


class TrainingError(WhetError, RuntimeError):
    """Training produced something that must not be built upon, such as a non-finite loss."""


class ClusterError(WhetError, RuntimeError):
    """A process or a machine of a run was lost, or kept the others waiting for too long. The same command may succeed
    another time, so it has an exit code of its own."""

    exit_code = 75


class SeveralErrors(WhetError):
    """Errors of different kinds that were found together."""

    def __init__(self, errors: Sequence[WhetError]) -> None:
        self.errors = tuple(errors)
        told = "\n".join(f"- {type(error).__name__}: {error}" for error in errors)
        super().__init__(f"{len(errors)} things stand in the way:\n{told}")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors for users say at their beginning what they are about."""
    try:
        yield
    except SeveralErrors as several:
        raise SeveralErrors([type(error)(f"{what}: {error}") for error in several.errors]) from several
    except WhetError as error:
        raise type(error)(f"{what}: {error}") from error


class Gathering:
    """Goes on after an error, to tell all at once: `with gathering.going_on(): …`, and `refuse` in the end."""

    def __init__(self) -> None:
        self.errors: list[WhetError] = []

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Takes note of an error for users; every other goes through."""
        try:
            yield
        except SeveralErrors as several:
            self._note(several.errors)
        except WhetError as error:
            self._note([error])

    @classmethod
    @contextmanager
    def of(cls, errors: Gathering | None) -> Iterator[Gathering]:
        """What the caller brought, who will refuse; or else one that refuses at the end."""
        own = errors if errors is not None else cls()
        yield own
        if errors is None:
            own.refuse()

    def refuse(self) -> None:
        """Raise what was taken note of: the error itself if it is one, SeveralErrors if there are more."""
        if len(self.errors) > 1:
            raise SeveralErrors(self.errors)
        if self.errors:
            raise self.errors[0]

    def _note(self, errors: Sequence[WhetError]) -> None:
        told = {str(error) for error in self.errors}  # what two checks stumble over is told once
        self.errors += [error for error in errors if str(error) not in told]
