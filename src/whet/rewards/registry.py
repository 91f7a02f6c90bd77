"""Rewards by name: the built-in ones, and those of users by dotted path."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from whet.config.names import did_you_mean, unique_names
from whet.config.plugin import options_of, resolve, validated_options
from whet.config.problems import problems_of
from whet.config.rollout import RewardConfig
from whet.config.run import RunConfig
from whet.errors import ConfigError
from whet.rewards.boxed import BoxedReward
from whet.rewards.choice import RewardChoice
from whet.rewards.code import CodeReward
from whet.rewards.dapo import DapoReward
from whet.rewards.deepscaler import DeepScalerReward
from whet.rewards.exact import ExactReward
from whet.rewards.f1 import F1Reward
from whet.rewards.gpqa import GpqaReward
from whet.rewards.ifeval import IFEvalReward
from whet.rewards.judge import JudgeReward
from whet.rewards.math import MathReward
from whet.rewards.model import ModelReward
from whet.rewards.random import coin
from whet.rewards.remote import RemoteReward
from whet.rewards.score import NamedReward, RewardScorer
from whet.rewards.slime import slime_reward
from whet.rollout.slime import SlimeArgs

BUILTINS: dict[str, Any] = {
    "math": MathReward,
    "deepscaler": DeepScalerReward,
    "dapo": DapoReward,
    "exact": ExactReward,
    "f1": F1Reward,
    "gpqa": GpqaReward,
    "ifeval": IFEvalReward,
    "code": CodeReward,
    "model": ModelReward,
    "judge": JudgeReward,
    "remote_rm": RemoteReward,
    "random": coin,
}
BOXED = "boxed_"
UNBOXED = {
    "deepscaler": "looks for </think>, which no box holds",
    "dapo": "looks for a line `Answer:`, which no box holds",
}
"""Rewards that make nothing of a box's content, and why."""
EPISODE, GROUP = ("episode", "sample"), ("episodes", "samples")
"""Names of the parameter that tell what a function judges."""


def build_scorer(configs: RewardConfig | Sequence[RewardConfig] | None, run: RunConfig | None = None) -> RewardScorer:
    """The scorer of a run, from `reward` in its configuration; `run` is what functions of `(args, sample)` see.

    Raises ConfigError without any reward, for an unknown name, or for wrong options.
    """
    single = isinstance(configs, RewardConfig)
    listed = [configs] if single else list(configs or ())
    if not listed:
        raise ConfigError(
            f"reward is not set, but completions are to be judged; set reward.use to one of "
            f"{', '.join(BUILTINS)}, or to a function of your own as in my.rewards:exact"
        )
    places = ["reward" if single else f"reward[{position}]" for position in range(len(listed))]
    names = unique_names([re.split(r"[.:]", config.use)[-1] for config in listed])
    rewards = [
        replace(named_reward(config, where=where, run=run), name=name)
        for config, where, name in zip(listed, places, names, strict=True)
    ]

    def build(setting: str, wanted: str, position: int) -> NamedReward:
        return reward_of_row(setting, wanted, listed[position], rewards[position], names, places[position], run)

    for position, config in enumerate(listed):
        for wanted in config.by_type:
            build("rm_type", wanted, position)  # so that mistakes are told before a row asks for it
    type_at = next((position for position, config in enumerate(listed) if is_builtin(config.use)), None)
    return RewardScorer(rewards, RewardChoice(rewards, build, own_at=type_at or 0, type_at=type_at))


def reward_of_row(
    setting: str,
    wanted: str,
    config: RewardConfig,
    reward: NamedReward,
    names: Sequence[str],
    where: str,
    run: RunConfig | None,
) -> NamedReward:
    """The reward that rows ask for by `metadata.<setting>`, with weight and limit of `reward`, whose place it takes.

    A function of the user's own must be listed in `by_type`: data do not choose what code is run.
    Raises ConfigError for one that is not there, or cannot be made.
    """
    listed = wanted in config.by_type
    if not listed and wanted == config.use:
        return reward
    if not listed and not is_builtin(wanted):
        if re.search("[.:]", wanted):
            raise ConfigError(
                f"metadata.{setting} is {wanted!r}, a function that rows may choose only if {where}.by_type lists "
                f"it, as in {{{wanted!r}: {{}}}}"
            )
        resolve(wanted, BUILTINS, what="reward", where=f"metadata.{setting}")
    place = f"{where}.by_type.{wanted}" if listed else f"metadata.{setting}"
    written = {"weight": config.weight, "timeout_s": config.timeout_s, **config.by_type.get(wanted, {}), "use": wanted}
    try:
        chosen = RewardConfig.model_validate(written)
    except ValidationError as error:
        problems = [problem.text for problem in problems_of(error, written, RewardConfig)]
        raise ConfigError(f"{place}: {'; '.join(problems)}") from error
    made = named_reward(chosen, where=place, run=run)
    name = reward.name if wanted == config.use else unique_names([*names, re.split(r"[.:]", wanted)[-1]])[-1]
    return replace(made, name=name)


def named_reward(config: RewardConfig, *, where: str = "reward", run: RunConfig | None = None) -> NamedReward:
    """One reward function under the name that chooses it, its options checked and bound.

    What `use` names is a function of an episode (sync or async), or of a whole group; or a class or function without
    positional parameters that makes one. Keyword-only parameters are its options in either case. Functions of slime's
    signature, `(args, sample)` or `(args, samples)`, get views of both; options that are no parameters of
    theirs are attributes of `args`.
    Raises ConfigError naming `where` otherwise.
    """
    reward, parameter = _made(config, where, run)
    group = config.group if config.group is not None else parameter in GROUP
    if (group and parameter in EPISODE) or (not group and parameter in GROUP):
        judged = "one at a time" if group else "a whole group at once"
        raise ConfigError(
            f"{where}.group is {str(config.group).lower()}, but {config.use!r} judges {judged}, by the name of its "
            f"parameter {parameter!r}; leave `group` out, or rename it"
        )
    return NamedReward(config.use, reward, config.weight, config.timeout_s, config.key, group)


def _made(config: RewardConfig, where: str, run: RunConfig | None) -> tuple[Any, str]:
    """What is called with an episode or a group, and the name of the parameter that takes it."""
    if config.use.startswith(BOXED):
        return _boxed(config, where, run), EPISODE[0]
    target: Any = resolve(config.use, BUILTINS, what="reward", where=f"{where}.use")
    required = required_positionals(target, config.use, where)
    if len(required) == 2 and required[0] == "args" and not inspect.isclass(target):
        own = set(options_of(target).model_fields)
        given = {name: value for name, value in config.options.items() if name in own}
        args = SlimeArgs(run, {name: value for name, value in config.options.items() if name not in own})
        return slime_reward(target, args, validated_options(target, given, where=where)), required[1]
    options = validated_options(target, config.options, where=where)
    if not required:
        reward = target(**options)
        if not callable(reward):
            raise ConfigError(
                f"{where}.use is {config.use!r}, which makes a {type(reward).__name__}; expected something to call "
                f"with an episode: give the class a method `async def __call__(self, episode)`"
            )
        return reward, next(iter(required_positionals(reward, config.use, where)), "")
    if inspect.isclass(target) or len(required) > 1:
        raise ConfigError(
            f"{where}.use is {config.use!r}, which needs the positional parameters {', '.join(required)}; a reward "
            f"takes one, the episode, and a class or factory takes none: make the others keyword-only"
        )
    return functools.partial(target, **options) if options else target, required[0]


def _boxed(config: RewardConfig, where: str, run: RunConfig | None) -> BoxedReward:
    inner = config.use.removeprefix(BOXED)
    if inner in UNBOXED:
        raise ConfigError(f"{where}.use is {config.use!r}, but {inner!r} {UNBOXED[inner]}; use {inner!r} itself")
    if inner not in BUILTINS:
        raise ConfigError(
            f"{where}.use is {config.use!r}, but there is no built-in reward {inner!r}{did_you_mean(inner, BUILTINS)}; "
            f"only those can follow {BOXED!r}: {', '.join(name for name in BUILTINS if name not in UNBOXED)}"
        )
    return BoxedReward(_made(config.model_copy(update={"use": inner}), where, run)[0])


def is_builtin(use: str) -> bool:
    """Whether a name is that of a reward of whet's."""
    return use.removeprefix(BOXED) in BUILTINS


def required_positionals(target: Callable[..., Any], use: str, where: str) -> list[str]:
    """Names of the parameters that must be given by position."""
    if not callable(target):
        raise ConfigError(f"{where}.use is {use!r}, a {type(target).__name__}; expected a function or a class")
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(target).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
