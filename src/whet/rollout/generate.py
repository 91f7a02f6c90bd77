"""Functions of users that play an episode in place of environment and turns: of our signature, or of slime's."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from whet.config.base import Config, Plugin
from whet.config.plugin import options_of, resolve, validated_options
from whet.engines.protocol import Engine
from whet.errors import ConfigError, EngineError
from whet.rollout.episode import Decode, Play
from whet.rollout.protocols import EnvFactory
from whet.rollout.seeds import derive_seed
from whet.rollout.slime import SlimeArgs, SlimeSample
from whet.rollout.slime_sample import Unusable, read_sample, sampling_from, sampling_params
from whet.rollout.threads import heard
from whet.types import Completion, Episode, Sampling

OURS, SLIME = ("episode", "engine", "sampling"), ("args", "sample", "sampling_params")
WHERE = "rollout.generate"
ENDS = ("completed", "truncated", "aborted", "failed")
"""How an episode can have ended."""


class _Limits(BaseModel):
    """Options that every function has."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    timeout_s: float = Field(default=3600.0, gt=0)


@dataclass(frozen=True)
class Generate:
    """A function that plays episodes, its options bound. Stands where an environment's factory does.

    `slime`: whether it is called with `(args, sample, sampling_params)`; else with `(episode, engine, sampling)`.
    """

    name: str
    function: Callable[..., Any]
    slime: bool
    takes_tokenizer: bool
    timeout_s: float
    run: Config | None
    extra: Mapping[str, Any]

    def __call__(self, prompt: Any, tokenizer: Any) -> Any:
        raise AssertionError("a function plays the episodes: there is no environment to make")


def build_generate(plugin: Plugin, run: Config | None = None) -> Generate:
    """The function of `rollout.generate`; `run` is what `args` of slime's signature shows.

    Keyword-only parameters are its options, `timeout_s` besides (seconds of one episode at most, an hour when not
    given); of slime's signature all others are attributes of `args`. A keyword-only parameter `tokenizer` gets the
    tokenizer. Raises ConfigError for what is no such function.
    """
    function: Any = resolve(plugin.use, {}, what="function", where=f"{WHERE}.use")
    positional = _positionals(function)
    if positional not in (OURS, SLIME) or not _is_async(function):
        raise ConfigError(
            f"{WHERE}.use is {plugin.use!r}, which takes ({', '.join(positional)}); expected an async function of "
            f"({', '.join(OURS)}) or, as slime's, of ({', '.join(SLIME)})"
        )
    try:
        limit = _Limits.model_validate(plugin.options).timeout_s
    except ValidationError as error:
        raise ConfigError(f"{WHERE}.timeout_s is {plugin.options['timeout_s']!r}, expected seconds above 0") from error
    slime, own = positional == SLIME, options_of(function).model_fields
    takes_tokenizer = "tokenizer" in own
    options = {name: value for name, value in plugin.options.items() if name != "timeout_s" or name in own}
    extra = {name: options.pop(name) for name in list(options) if slime and name not in own}
    if takes_tokenizer and "tokenizer" in options:
        raise ConfigError(f"{WHERE}.tokenizer cannot be set; the function is given the tokenizer of the run")
    bound = partial(function, tokenizer=None) if takes_tokenizer else function
    options = validated_options(bound, options, where=WHERE)
    return Generate(plugin.use, partial(function, **options), slime, takes_tokenizer, limit, run, extra)


def begin(episode: Episode, factory: EnvFactory | Generate, tokenizer: Any) -> Play | GeneratedPlay:
    """The play of an episode: in an environment of its own, or by a function."""
    if isinstance(factory, Generate):
        return GeneratedPlay(episode, factory, tokenizer)
    return Play(episode, factory(episode.prompt, tokenizer))


class GeneratedPlay:
    """One episode that a function plays; where the engine aborted it, it begins anew.

    What the function returns becomes the episode. Of a list the first does, and `parts` are the others: one rollout,
    which counts once (`Episode.rollout`).
    """

    def __init__(self, episode: Episode, generate: Generate, tokenizer: Any) -> None:
        self.episode, self.parts = episode, list[Episode]()
        self.closed = True
        """There is nothing to let go of."""
        self._generate, self._tokenizer = generate, tokenizer

    async def run(self, engine: Engine, sampling: Sampling, *, seed: int, decode: Decode, timeout_s: float) -> Episode:
        """Let the function play. An exception, or what cannot be used, fails the episode with the reason.

        Raises EngineError if the engine fails, or does not answer one completion within `timeout_s`.
        """
        episode, name = self.episode, self._generate.name
        episode.restart()
        sampler = Sampler(engine, timeout_s, episode.group)
        sampling = replace(sampling, seed=derive_seed(seed, episode.group, episode.index, 0))
        limit = asyncio.timeout(self._generate.timeout_s)
        try:
            async with limit:
                returned = await self._call(sampler, sampling)
            if not sampler.was_aborted:
                self._take(self._read(returned, sampler), decode)
        except EngineError:
            episode.restart()
            raise
        except Exception as error:  # the user's code: any failure of it costs one episode, not the run
            told = f"raised {type(error).__name__}: {error}" if not isinstance(error, Unusable) else f"returned {error}"
            told = f"took longer than its timeout_s of {self._generate.timeout_s:g} s" if limit.expired() else told
            episode.restart()
            episode.status, episode.error = "failed", f"rollout.generate {name!r} {told}"
        except BaseException:
            episode.restart()
            raise
        if sampler.was_aborted:  # whatever the function made of what it got, it is not whole
            episode.restart()
            episode.status, self.parts = "aborted", []
        return episode

    async def close(self) -> None:
        """There is nothing to let go of."""

    async def _call(self, sampler: Sampler, sampling: Sampling) -> Any:
        generate, given = self._generate, {}
        if generate.takes_tokenizer:
            given["tokenizer"] = self._tokenizer
        if not generate.slime:
            return await heard(generate.function(self.episode, sampler, sampling, **given))

        async def complete(tokens: Sequence[int], params: Mapping[str, Any]) -> Completion:
            return await sampler.generate(tokens, sampling_from(params, sampling))

        args = SlimeArgs(generate.run, {**generate.extra, "generate": complete, "tokenizer": self._tokenizer})
        sample, params = SlimeSample.of(self.episode), sampling_params(sampling)
        return await heard(generate.function(args, sample, params, **given))

    def _read(self, returned: Any, sampler: Sampler) -> list[Episode]:
        listed = returned if isinstance(returned, list) else [returned]
        if self._generate.slime:
            return [read_sample(one, self.episode, sampler.oldest_version) for one in listed]
        return [_checked(one) for one in listed]

    def _take(self, found: list[Episode], decode: Decode) -> None:
        if not found:
            raise Unusable("an empty list, expected at least one episode")
        if len({id(one) for one in found}) < len(found):
            raise Unusable("one episode twice in a list; each part of a rollout is an Episode of its own")
        if len(found) > 1 and any(one.status == "aborted" for one in found):
            found = [next(one for one in found if one.status == "aborted")]  # all of it begins anew
        words = len(self._tokenizer)
        for one in found:
            if strange := [token for token in one.tokens if not 0 <= token < words]:
                raise Unusable(f"an episode with token {strange[0]}, and the tokenizer has {words}")
            one.response = one.response or decode(one.tokens[len(one.prompt.tokens) :])
        index, group = self.episode.index, self.episode.group
        for field in dataclasses.fields(Episode):
            setattr(self.episode, field.name, getattr(found[0], field.name))
        for one in (self.episode, *found[1:]):
            one.group, one.rollout = group, index
        self.episode.index, self.parts = index, found[1:]


class Sampler:
    """The engine as functions see it: `generate` alone, under the limit of the run, with new draws for each call."""

    def __init__(self, engine: Engine, timeout_s: float, prefix_key: str) -> None:
        self._engine, self._timeout_s, self._prefix_key = engine, timeout_s, prefix_key
        self._num_calls = 0
        self.oldest_version = 0
        """The oldest policy that has sampled so far."""
        self.was_aborted = False
        """Whether a completion was cut off by the engine."""

    async def generate(self, tokens: Sequence[int], sampling: Sampling, *, prefix_key: str | None = None) -> Completion:
        """One completion; see `Engine.generate`. `sampling.seed` need not differ from call to call."""
        number, self._num_calls = self._num_calls, self._num_calls + 1
        sampling = replace(sampling, seed=derive_seed(sampling.seed, number))
        self._require_servable(tokens, sampling)
        try:
            async with asyncio.timeout(self._timeout_s):
                completion = await self._engine.generate(tokens, sampling, prefix_key=prefix_key or self._prefix_key)
        except TimeoutError as error:
            raise EngineError(
                f"the engine did not complete {len(tokens)} tokens that rollout.generate asked for (group "
                f"{self._prefix_key}, at most {sampling.max_tokens} more) within {self._timeout_s:g} s; raise "
                f"engine.timeout_s, or ask for less"
            ) from error
        self.was_aborted |= completion.finish_reason == "abort"
        versions = [span.version for span in completion.versions]
        self.oldest_version = min(versions + [self.oldest_version] * bool(number), default=0)
        return completion

    def _require_servable(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """A request that the engine can never serve is a fault of the function: it costs one episode, not the run."""
        try:
            getattr(self._engine, "validate", lambda *_: None)(tuple(tokens), sampling)
        except EngineError as error:
            raise ValueError(str(error)) from error


def _checked(episode: Any) -> Episode:
    """An episode as it came back. Raises Unusable."""
    if not isinstance(episode, Episode):
        raise Unusable(f"a {type(episode).__name__}, expected an Episode, or a list of them")
    lengths = {name: len(getattr(episode, name)) for name in ("tokens", "loss_mask", "sampler_logprobs")}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise Unusable(f"an episode with {told}; there is one of each per token: use its inject and extend")
    if episode.status == "pending":
        raise Unusable("an episode that is pending; set its status, as in episode.status = 'completed'")
    if episode.status not in ENDS:
        raise Unusable(f"an episode with status {episode.status!r}, expected one of {', '.join(ENDS)}")
    if episode.reward is not None and not hasattr(episode.reward, "__float__"):
        raise Unusable(f"an episode with the reward {episode.reward!r:.80}, expected a number or None")
    if not all(map(math.isfinite, episode.sampler_logprobs)):
        raise Unusable("an episode with a logprob in sampler_logprobs that is not finite")
    return episode


def _positionals(function: Any) -> tuple[str, ...]:
    """Names of the parameters that must be given by position."""
    if not callable(function) or inspect.isclass(function):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds and p.default is p.empty)


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
