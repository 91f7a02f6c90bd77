"""What the rollout side is made of: Source, Env, Reward, Scorer, and what passes between them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from whet.config.backend import BackendConfig
from whet.types import Completion, Episode, Prompt, Unit

StateDict = dict[str, Any]


class Source(Protocol):
    """Where the loop gets its units from: rows of a data set, or scored episodes of the policy."""

    async def take(self, n: int) -> list[Unit]:
        """The next units, `n` of them, or fewer where the source says so.

        Every wait has a limit. Raises DataError, EngineError or RewardError when nothing can be had.
        """
        ...

    async def publish(self, snapshot: Any) -> None:
        """New weights are out: sample from them from now on. Data sets ignore it.

        `snapshot` is what the engine's `update_weights` takes; the policy's version for the embedded engine.
        """
        ...

    def state_dict(self) -> StateDict:
        """What `load_state_dict` needs to go on with exactly the units that would have come next."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment puts before the policy: tokens appended as they are and never trained on.

    Token-in, token-out: history is never rendered or tokenised again, so an observation holds only
    what is new, wrappers of the chat template included.
    """

    tokens: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """An environment's answer to one completion: over, or something new to respond to."""

    done: bool
    observation: Observation = Observation()


class Env(Protocol):
    """The world that one episode is played in; made anew for each episode.

    An exception from either method marks this episode as failed; the others go on. Methods may be plain or async;
    plain ones run in threads. An environment may have an attribute `stop`, texts that end a completion; a method
    `info()`, whose numbers are logged as `rollout/env/<name>`; and a method `close()`, called when the episode is
    over, aborted and cancelled ones included.
    """

    def reset(self) -> Observation | Awaitable[Observation]:
        """Begin. Returns what follows the prompt before the first completion; usually nothing."""
        ...

    def step(self, completion: Completion) -> Turn | Awaitable[Turn]:
        """Answer a completion that ended by itself. Cut-off and aborted ones are never shown to it."""
        ...


EnvFactory = Callable[[Prompt, Any], Env]
"""`factory(prompt, tokenizer) -> Env`; keyword-only parameters of a factory are its options.

A factory may have an attribute `tools`, the functions that prompts show to the policy; an attribute `max_injected`,
the most tokens that an environment adds to an episode; a method
`prepare(tokenizer, variables)`, called before prompts are read with the tokenizer and `data.template_kwargs`, which
raises ConfigError or ModelError for what it cannot work with; and a method `check(prompt)`, which raises ValueError for
a prompt that it could never play."""


class Reward(Protocol):
    """A function of a finished episode, sync or async.

    A dict is recorded part by part; its `score` is what counts, or the sum of all parts without one. Text
    beside a `score` is left out. None, a number that is not finite, or an exception marks the episode as
    failed. A reward may have a method `check(prompt)` that raises ValueError for a prompt which it could never
    judge, a method `load(backend)` that loads a model under the run's `BackendConfig`, a method
    `report(episodes)` that logs what is to be said of a whole batch, and a number `max_concurrent` of calls that
    it takes at a time.
    """

    def __call__(self, episode: Episode) -> float | dict[str, float] | Awaitable[float | dict[str, float]]: ...


class Scorer(Protocol):
    """Gives episodes their rewards."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises DataError for prompts that can never be judged; called before a model is loaded."""
        ...

    def load(self, backend: BackendConfig) -> None:
        """Load models that rewards are computed with; called once the run's own is there."""
        ...

    async def score(self, episode: Episode) -> None:
        """Fill in `reward` and `rewards`, or mark the episode as failed and say why in `error`."""
        ...

    async def score_group(self, episodes: Sequence[Episode]) -> None:
        """Fill in what follows from a whole group, all of whose members have been through `score`."""
        ...

    def report_failures(self, episodes: Sequence[Episode]) -> None:
        """Warn of failed episodes, and of what rewards have to say of a batch.

        Raises RewardError with the first cause if all failed.
        """
        ...

    def report_uniform(self, episodes: Sequence[Episode]) -> None:
        """Warn when all episodes of a training step have the same reward."""
        ...
