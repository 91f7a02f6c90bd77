"""Environments by name: the built-in ones, and those of users by dotted path."""

from __future__ import annotations

import functools
from typing import Any

from whet.config.base import Plugin
from whet.config.plugin import resolve, validated_options
from whet.envs.single import SingleTurn
from whet.errors import ConfigError
from whet.rollout.protocols import EnvFactory

BUILTINS: dict[str, Any] = {"single": SingleTurn}


def build_env(config: Plugin | None) -> EnvFactory:
    """What makes the environment of each episode, its options checked and bound.

    `env.use` names a class (or function) called with the prompt and the tokenizer; its keyword-only
    parameters are its options. Raises ConfigError for an unknown name or wrong options.
    """
    if config is None:
        return SingleTurn
    target: Any = resolve(config.use, BUILTINS, what="environment", where="env.use")
    if not callable(target):
        raise ConfigError(f"env.use is {config.use!r}, a {type(target).__name__}; expected a class with reset and step")
    options = validated_options(target, config.options, where="env")
    return functools.partial(target, **options) if options else target
