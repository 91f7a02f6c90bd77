"""Rewards by name: the built-in ones, and those of users by dotted path."""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from whet.config.plugin import resolve, validated_options
from whet.config.rollout import RewardConfig
from whet.errors import ConfigError
from whet.rewards.exact import ExactReward
from whet.rewards.judge import JudgeReward
from whet.rewards.math import MathReward
from whet.rewards.model import ModelReward
from whet.rewards.random import coin
from whet.rewards.score import NamedReward, RewardScorer
from whet.rollout.protocols import Reward

BUILTINS: dict[str, Any] = {
    "math": MathReward,
    "exact": ExactReward,
    "model": ModelReward,
    "judge": JudgeReward,
    "random": coin,
}


def build_scorer(configs: RewardConfig | Sequence[RewardConfig] | None) -> RewardScorer:
    """The scorer of a run, from `reward` in its configuration.

    Raises ConfigError without any reward, for an unknown name, or for wrong options.
    """
    single = isinstance(configs, RewardConfig)
    listed = [configs] if single else list(configs or ())
    if not listed:
        raise ConfigError(
            f"reward is not set, but completions are to be judged; set reward.use to one of "
            f"{', '.join(BUILTINS)}, or to a function of your own as in my.rewards:exact"
        )
    rewards = [
        build_reward(config, where="reward" if single else f"reward[{position}]")
        for position, config in enumerate(listed)
    ]
    names = unique_names([re.split(r"[.:]", config.use)[-1] for config in listed])
    return RewardScorer(
        [
            NamedReward(name, reward, config.weight, config.timeout_s)
            for name, reward, config in zip(names, rewards, listed, strict=True)
        ]
    )


def build_reward(config: RewardConfig, *, where: str = "reward") -> Reward:
    """One reward function, its options checked and bound.

    What `use` names is a function of an episode (sync or async), or a class or function without
    positional parameters that makes one. Keyword-only parameters are its options in either case.
    Raises ConfigError naming `where` otherwise.
    """
    target: Any = resolve(config.use, BUILTINS, what="reward", where=f"{where}.use")
    required = required_positionals(target, config.use, where)
    options = validated_options(target, config.options, where=where)
    if not required:
        reward = target(**options)
        if not callable(reward):
            raise ConfigError(
                f"{where}.use is {config.use!r}, which makes a {type(reward).__name__}; expected something to call "
                f"with an episode: give the class a method `async def __call__(self, episode)`"
            )
        return reward
    if inspect.isclass(target) or len(required) > 1:
        raise ConfigError(
            f"{where}.use is {config.use!r}, which needs the positional parameters {', '.join(required)}; a reward "
            f"takes one, the episode, and a class or factory takes none: make the others keyword-only"
        )
    return functools.partial(target, **options) if options else target


def required_positionals(target: Callable[..., Any], use: str, where: str) -> list[str]:
    """Names of the parameters that must be given by position."""
    if not callable(target):
        raise ConfigError(f"{where}.use is {use!r}, a {type(target).__name__}; expected a function or a class")
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(target).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]


def unique_names(names: Sequence[str]) -> list[str]:
    """Names with a number after each repetition: math, exact, math-2."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return result
