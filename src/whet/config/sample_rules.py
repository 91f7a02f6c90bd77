"""Rules between the settings of rejection sampling, and which methods its rows are for."""

from __future__ import annotations

from collections.abc import Iterator

from whet.config.data import DataConfig
from whet.config.names import show
from whet.config.problems import Problem
from whet.config.rollout import RolloutConfig
from whet.config.rollout_rules import idle_problems
from whet.config.run import RunConfig
from whet.config.sample import SampleConfig

METHOD = "sample"
APPLIES = {
    "keep": ("best", "pairs"),
    "min_score": ("best", "pairs", "all"),
    "min_gap": ("pairs",),
}
"""Settings of `sample` that only some selections have a use for."""


def sampling_problems(config: RunConfig) -> Iterator[Problem]:
    """What does not go together in a configuration for `whet sample`; nothing for other methods."""
    if config.method != METHOD:
        return
    yield from _selection(config)
    yield from _trains_nothing(config)
    if config.rollout.optimizer_steps != RolloutConfig.model_fields["optimizer_steps"].default:
        steps = config.rollout.optimizer_steps
        yield _problem("rollout.optimizer_steps", steps, "sample takes no optimizer steps; remove it")
    yield from idle_problems(config.rollout, METHOD)
    if config.data.max_length != DataConfig.model_fields["max_length"].default:
        limits = "data.max_prompt_length limits prompts and rollout.max_tokens completions"
        yield _problem("data.max_length", config.data.max_length, f"sample has no use for it: {limits}; remove it")


def _selection(config: RunConfig) -> Iterator[Problem]:
    chosen = config.sample.select
    for name, selections in APPLIES.items():
        value = getattr(config.sample, name)
        if chosen not in selections and value != SampleConfig.model_fields[name].default:
            goes = " or ".join(selections)
            yield _problem(f"sample.{name}", value, f"sample.select {chosen!r} has no use for it; it goes with {goes}")
    if chosen == "pairs" and config.rollout.group_size < 2:
        yield _problem(
            "rollout.group_size",
            config.rollout.group_size,
            "a pair takes at least two completions of a prompt; raise it",
        )


def _trains_nothing(config: RunConfig) -> Iterator[Problem]:
    if config.model.adapter is not None:
        yield Problem(
            ("model", "adapter"),
            "model.adapter is given, but sample trains nothing; to sample with an adapter, give its folder as "
            "model.path",
        )
    if config.model.freeze != type(config.model.freeze)():
        yield Problem(("model", "freeze"), "model.freeze is given, but sample trains nothing; remove it")
    for name in ("eval", "eval_share"):
        value = getattr(config.data, name)
        if value:
            yield _problem(f"data.{name}", value, "sample evaluates nothing; remove it, and sample from data.train")


def _problem(path: str, value: object, text: str) -> Problem:
    return Problem(tuple(path.split(".")), f"{path} is {show(value)}, but {text}")
