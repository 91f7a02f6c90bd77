"""What the rollout side asks of whatever samples completions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from whet.types import Completion, Sampling


class Engine(Protocol):
    """Samples completions of token sequences. Token-in, token-out: no engine sees or makes text.

    An engine may have a method `release()`, which lets go of what it keeps for later requests: it is called when a
    step or an evaluation has been sampled, and the trainer needs the memory; a number `max_length` of tokens that a
    prompt and its completion may have together; and a method `validate(tokens, sampling)`, which raises EngineError for
    a request that it could never serve.

    Every wait has a limit: a method that cannot answer within the engine's own raises EngineError and
    says what it waited for. A failure reaches every caller that waits; none is left hanging.
    """

    async def generate(self, tokens: Sequence[int], sampling: Sampling, *, prefix_key: str | None = None) -> Completion:
        """Sample one completion of `tokens`.

        Requests with the same `prefix_key` (a group's id) share their prompt: an engine sends them to the
        same place and computes the prompt's keys and values once. The key never changes what is sampled.
        The tokens depend on `sampling.seed` and their index in the completion, not on what else is in
        flight. The completion's `tokens` include the stop token; `finish_reason` is `stop` (stop token or
        stop string), `length` (max_tokens) or `abort` (told to stop; tokens may be few or none).
        Cancelling the call takes the request out of the engine.
        Raises EngineError for a request that cannot be served, or when the engine fails.
        """
        ...

    async def update_weights(self, snapshot: Any) -> None:
        """Sample with these weights from the next token on; they are in use when the call returns.

        `snapshot` is a `weights.snapshot.Snapshot`; its version alone serves an engine that reads the trainer's own
        memory. Requests in flight go on, and their completions tell by `versions` which policy sampled which tokens.
        Raises EngineError where the engine does not have these weights afterwards.
        """
        ...

    async def pause(self) -> None:
        """Sample nothing from the return of this call on. Requests in flight and new ones wait for `resume`."""
        ...

    async def resume(self) -> None:
        """Go on where `pause` stopped."""
        ...

    async def abort(self, prefix_keys: Collection[str] | None = None) -> None:
        """End every request in flight, or those with these keys, with the tokens it has and finish reason `abort`."""
        ...

    async def close(self) -> None:
        """Abort what is in flight and let go of the engine's memory. A closed engine serves nothing more."""
        ...

    def health(self) -> dict[str, Any]:
        """At least `status` (`ok`, `paused`, `closed`), `version`, and the numbers `active` and `waiting`."""
        ...


def release(engine: Engine) -> None:
    """Let an engine let go of what it keeps for later requests, if it keeps anything."""
    if (let_go := getattr(engine, "release", None)) is not None:
        let_go()
