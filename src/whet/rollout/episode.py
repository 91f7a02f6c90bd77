"""Playing one episode: the policy and an environment take turns, in tokens, until one of them ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from whet.engines.protocol import Engine
from whet.errors import EngineError
from whet.rollout.protocols import Env, Observation, Turn
from whet.rollout.seeds import derive_seed
from whet.rollout.world import EnvFailure, ask, close, info_of
from whet.types import Completion, Episode, Sampling

Decode = Callable[[Sequence[int]], str]


def response_decoder(tokenizer: Any, stop_token_ids: Sequence[int] = ()) -> Decode:
    """A function from response tokens to text, without the special and stop tokens at its end.

    Special tokens further in stay: they tell a reward what the policy did.
    """
    closing = frozenset(tokenizer.all_special_ids) | frozenset(stop_token_ids)

    def decode(tokens: Sequence[int]) -> str:
        end = len(tokens)
        while end and tokens[end - 1] in closing:
            end -= 1
        return tokenizer.decode(list(tokens[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode


class Play:
    """One episode being played in its environment. A play that the engine aborted can be gone on with.

    The environment sees a completion when it is whole, however often it was interrupted. Its own stop texts are
    added to those of the sampling; what it counts becomes the episode's `info`; it is closed when the episode is over
    or given up.
    """

    def __init__(self, episode: Episode, env: Env) -> None:
        self.episode, self.env = episode, env
        self.closed = False
        self._turn = 0
        self._begin: int | None = None
        """Where the completion of this turn begins; None before the environment was reset."""

    async def run(self, engine: Engine, sampling: Sampling, *, seed: int, decode: Decode, timeout_s: float) -> Episode:
        """Play on until the episode ends; set its tokens, response and status.

        `sampling.max_tokens` bounds the sampled tokens of all turns together; each turn samples with a
        seed derived from (seed, group, index, turn). Status: `completed` (the environment ended it),
        `truncated` (the tokens, or the positions of the model, ran out), `aborted` (the engine was told to stop),
        `failed` (the environment raised or took longer than `timeout_s`; `error` says why).
        Raises EngineError if the engine fails, or does not answer one completion within `timeout_s`.
        """
        episode = self.episode
        episode.status = "pending"
        own = getattr(self.env, "stop", ())
        own = (own,) if isinstance(own, str) else own
        sampling = replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *own))))
        try:
            await self._play(engine, sampling, seed, timeout_s)
            episode.info = info_of(self.env)
        except EnvFailure as failure:
            episode.status, episode.error = "failed", str(failure)
        except BaseException:
            episode.restart()  # nobody knows where the environment stands
            raise
        finally:
            if episode.status != "aborted":
                await self.close()
        episode.response = decode(episode.tokens[len(episode.prompt.tokens) :])
        episode.answer = decode(episode.tokens[self._begin :]) if self._turn else None
        return episode

    async def close(self) -> None:
        """Let go of the environment; the play cannot go on then."""
        if not self.closed:
            self.closed = True
            await close(self.env)

    async def _play(self, engine: Engine, sampling: Sampling, seed: int, timeout_s: float) -> None:
        episode = self.episode
        if self._begin is None:
            await self._reset(timeout_s)
        while (left := self._room(engine, sampling)) > 0:
            asked = replace(sampling, max_tokens=left, seed=self._seed(seed))
            self._require_servable(engine, asked)
            completion = await _complete(episode, engine, asked, timeout_s)
            episode.extend(completion)
            if completion.finish_reason != "stop":
                episode.status = "truncated" if completion.finish_reason == "length" else "aborted"
                return
            answer: Turn = await ask(self.env, "step", timeout_s, self._whole())
            if answer.done:
                episode.status = "completed"
                return
            longest = getattr(engine, "max_length", None)
            if longest is not None and len(episode.tokens) + len(answer.observation.tokens) > longest:
                break  # what the model has no positions for is not kept: the trainer would have to read it
            episode.inject(answer.observation.tokens)
            self._turn, self._begin = self._turn + 1, len(episode.tokens)
        episode.status = "truncated"

    def _room(self, engine: Engine, sampling: Sampling) -> int:
        """Tokens that may still be sampled; what environments say counts towards the positions of the model."""
        left, longest = sampling.max_tokens - self.episode.num_sampled, getattr(engine, "max_length", None)
        return left if longest is None else min(left, longest - len(self.episode.tokens))

    def _require_servable(self, engine: Engine, sampling: Sampling) -> None:
        """What an environment said may be nothing that a model can read, such as ids beyond its words."""
        if len(self.episode.tokens) == len(self.episode.prompt.tokens):
            return
        try:
            getattr(engine, "validate", lambda *_: None)(tuple(self.episode.tokens), sampling)
        except EngineError as error:
            raise EnvFailure(f"after environment {type(self.env).__name__} the engine cannot go on: {error}") from error

    async def _reset(self, timeout_s: float) -> None:
        """Begin; go on with what an earlier process sampled in the first turn, and with nothing of later ones."""
        episode = self.episode
        observation: Observation = await ask(self.env, "reset", timeout_s)
        opening = list(observation.tokens)
        begin = len(episode.prompt.tokens) + len(opening)
        known = episode.tokens[len(episode.prompt.tokens) : begin] == opening and all(episode.loss_mask[begin:])
        if not known or begin >= len(episode.tokens):
            episode.restart()
            episode.inject(opening)
        self._begin = begin

    def _seed(self, seed: int) -> int:
        """What the rest of this turn samples with; it does not repeat the draws of the part that is there."""
        episode, done = self.episode, len(self.episode.tokens) - (self._begin or 0)
        parts = (seed, episode.group, episode.index, self._turn)
        return derive_seed(*parts, done) if done else derive_seed(*parts)

    def _whole(self) -> Completion:
        """The completion of this turn with all its parts."""
        episode, begin = self.episode, self._begin or 0
        spans = [replace(s, start=s.start - begin, end=s.end - begin) for s in episode.versions if s.start >= begin]
        return Completion(episode.tokens[begin:], episode.sampler_logprobs[begin:], "stop", tuple(spans))


async def _complete(episode: Episode, engine: Engine, sampling: Sampling, timeout_s: float) -> Completion:
    try:
        async with asyncio.timeout(timeout_s):
            completion = await engine.generate(episode.tokens, sampling, prefix_key=episode.group)
    except TimeoutError as error:
        raise EngineError(
            f"the engine did not complete episode {episode.group}/{episode.index} (prompt {episode.prompt.id}, "
            f"{len(episode.tokens)} tokens so far, at most {sampling.max_tokens} more) within {timeout_s:g} s; "
            f"raise engine.timeout_s, or lower rollout.max_tokens or the number of completions per step"
        ) from error
    if len(completion.tokens) != len(completion.logprobs):
        raise EngineError(
            f"the engine answered episode {episode.group}/{episode.index} with {len(completion.tokens)} tokens but "
            f"{len(completion.logprobs)} logprobs; every sampled token needs one"
        )
    if not completion.tokens and completion.finish_reason != "abort":
        # A turn without a token would let an environment go on for ever.
        raise EngineError(
            f"the engine answered episode {episode.group}/{episode.index} with no token and finish reason "
            f"{completion.finish_reason!r}; only an aborted completion may be empty"
        )
    return completion
