"""A clock that jumps, and an engine whose tokens take as long as they are told: thousands of schedules in a minute."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

from whet.errors import EngineError
from whet.types import Completion, Episode, FinishReason, Sampling, VersionSpan

END = 257


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop in which nobody waits: where nothing is left to do, the clock stands at the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        if not self._ready and timers:  # type: ignore[attr-defined]
            self.now = max(self.now, timers[0].when())
        super()._run_once()  # type: ignore[misc]


def run_at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on a clock that jumps."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(coroutine)


class TimedEngine:
    """Samples tokens one by one, `seconds(rng)` each; a completion has as many as its prompt key and seed say.

    With a chance of `fails` a request raises. Requests can be aborted by key, and tell which version sampled what.
    """

    def __init__(self, rng: random.Random, seconds: Callable[[random.Random], float], *, fails: float = 0.0) -> None:
        self.rng, self.seconds, self.fails = rng, seconds, fails
        self.version = 0
        self.aborted: set[int] = set()
        self.requests: dict[int, str | None] = {}
        self.most_groups = self.num_tokens = 0

    async def generate(self, tokens: Sequence[int], sampling: Sampling, *, prefix_key: str | None = None) -> Completion:
        if self.rng.random() < self.fails:
            raise EngineError("the engine is gone")
        request = object()
        self.requests[id(request)] = prefix_key
        self.most_groups = max(self.most_groups, len(set(self.requests.values())))
        length = min(sampling.max_tokens, 1 + random.Random(f"{prefix_key}{sampling.seed}").randrange(6))
        sampled: list[int] = []
        versions: list[int] = []
        reason: FinishReason = "stop"
        try:
            while len(sampled) < length:
                await asyncio.sleep(self.seconds(self.rng))
                if id(request) in self.aborted:
                    reason = "abort"
                    break
                sampled.append(END if len(sampled) == length - 1 else 97)
                versions.append(self.version)
                self.num_tokens += 1
        finally:
            self.aborted.discard(id(request))
            del self.requests[id(request)]
        spans = tuple(VersionSpan(version, i, i + 1) for i, version in enumerate(versions))
        return Completion(sampled, [-0.5] * len(sampled), reason, spans)

    async def update_weights(self, snapshot: int) -> None:
        self.version = snapshot

    async def abort(self, prefix_keys: Collection[str] | None = None) -> None:
        self.aborted |= {one for one, key in self.requests.items() if prefix_keys is None or key in prefix_keys}


class Scorer:
    """Gives `reward(episode)` after `seconds(rng)`; None fails the episode."""

    def __init__(self, rng: random.Random, reward: Callable[[Episode], float | None], seconds=lambda rng: 0.0) -> None:
        self.rng, self.reward, self.seconds = rng, reward, seconds
        self.judged: list[tuple[str, int]] = []

    async def score(self, episode: Episode) -> None:
        if episode.status in ("aborted", "failed") or episode.reward is not None:
            return
        await asyncio.sleep(self.seconds(self.rng))
        self.judged.append((episode.group, episode.index))
        value = self.reward(episode)
        if value is None:
            episode.status, episode.error = "failed", "no reward"
        else:
            episode.reward, episode.rewards = float(value), {"mine": float(value)}

    async def score_group(self, episodes: Sequence[Episode]) -> None: ...

    def report_failures(self, episodes: Sequence[Episode]) -> None: ...

    def report_uniform(self, episodes: Sequence[Episode]) -> None: ...
