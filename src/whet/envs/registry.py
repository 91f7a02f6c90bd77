"""Environments by name: the built-in ones, and those of users by dotted path."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from whet.config.base import Plugin
from whet.config.plugin import resolve, validated_options
from whet.envs.search import Search
from whet.envs.single import SingleTurn
from whet.envs.tools import Tools
from whet.errors import ConfigError, DataError
from whet.rollout.protocols import EnvFactory
from whet.types import Prompt

BUILTINS: dict[str, Any] = {"single": SingleTurn, "tools": Tools, "search": Search}


def build_env(config: Plugin | None, tokenizer: Any = None, variables: Mapping[str, Any] | None = None) -> EnvFactory:
    """What makes the environment of each episode, its options checked and bound.

    `env.use` names a class (or function) called with the prompt and the tokenizer for each episode; or one without
    positional parameters, called once, that gives what is called with these. Keyword-only parameters are options.
    With a tokenizer, and the `variables` of its chat template, the factory is prepared for them.
    Raises ConfigError for an unknown name or wrong options, ModelError for a chat template that does not do.
    """
    if config is None:
        return SingleTurn
    target: Any = resolve(config.use, BUILTINS, what="environment", where="env.use")
    if not callable(target):
        raise ConfigError(f"env.use is {config.use!r}, a {type(target).__name__}; expected a class with reset and step")
    options = validated_options(target, config.options, where="env")
    factory = functools.partial(target, **options) if options else target
    if not _takes_prompt(target):
        factory = factory()
        if not callable(factory):
            raise ConfigError(
                f"env.use is {config.use!r}, which takes no prompt and makes a {type(factory).__name__}; expected "
                f"something to call with a prompt and the tokenizer"
            )
    if tokenizer is not None and hasattr(factory, "prepare"):
        factory.prepare(tokenizer, dict(variables or {}))
    return factory


def check_prompts(factory: EnvFactory, prompts: Iterable[Prompt]) -> None:
    """Ask an environment whether it can play these prompts at all, before a model is loaded.

    Raises DataError with the first that it cannot, and how many there are.
    """
    check = getattr(factory, "check", None)
    faults = [fault for prompt in prompts if check is not None and (fault := _fault(check, prompt))]
    if faults:
        raise DataError(
            f"the environment cannot play {len(faults)} prompts; the first is {faults[0]}; correct the rows or env"
        )


def _takes_prompt(target: Any) -> bool:
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    return any(one.kind in positional for one in inspect.signature(target).parameters.values())


def _fault(check: Any, prompt: Prompt) -> str | None:
    try:
        check(prompt)
    except ValueError as error:
        return f"{prompt.id}: {error}"
    return None
