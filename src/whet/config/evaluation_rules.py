"""Rules between the settings of evaluation, and what the name of a metric tells."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

from whet.config.names import did_you_mean, show
from whet.config.problems import Problem
from whet.config.run import RunConfig

OF_PROMPTS = ("num_samples", "max_prompts", "max_tokens", "temperature", "top_p", "top_k", "sets")
"""Settings of `eval` that only sampling from prompts has a use for."""
LESS_IS_BETTER = ("loss", "perplexity")
MORE_IS_BETTER = ("accuracy", "accuracies", "reward", "score", "margin", "pass@", "mean@")


def evaluation_problems(config: RunConfig) -> Iterator[Problem]:
    """What does not go together in how a run is evaluated."""
    yield from _held_out(config)
    yield from _best(config)
    yield from _metric(config)
    yield from _sampling(config)


def metric_mode(metric: str, sets: Collection[str] = ()) -> Literal["min", "max"] | None:
    """Whether less or more of a metric is better, judged by its name without that of its set; None where the name
    does not say."""
    of, _, rest = metric.removeprefix("eval/").partition("/")
    metric = rest if of in sets else metric
    if any(word in metric for word in LESS_IS_BETTER):
        return "min"
    return "max" if any(word in metric for word in MORE_IS_BETTER) else None


def default_metric(config: RunConfig, *, samples: bool) -> str:
    """What makes a checkpoint the best one where `eval.metric` does not say; `samples` from prompts, or not."""
    if not samples:
        return "eval/loss"
    first = next(iter(config.eval.sets), None)
    return "eval/reward" if first is None or _has_default_set(config) else f"eval/{first}/reward"


def _has_default_set(config: RunConfig) -> bool:
    return config.data.eval is not None or config.data.eval_share > 0


def _held_out(config: RunConfig) -> Iterator[Problem]:
    data, evaluation = config.data, config.eval
    if data.eval is not None and data.eval_share > 0:
        yield _problem(
            "data.eval_share",
            f"data.eval_share is {data.eval_share}, but data.eval already names a file to evaluate on; keep one",
        )
    asked = {
        "eval.every_steps": evaluation.every_steps is not None,
        "eval.every_epochs": evaluation.every_epochs is not None,
        "eval.at_start": evaluation.at_start,
        "eval.patience": evaluation.patience is not None,
        "checkpoint.best": config.checkpoint.best,
    }
    for name, is_asked in asked.items():
        if is_asked and not _has_default_set(config) and not evaluation.sets:
            section, _, key = name.partition(".")
            value = show(getattr(getattr(config, section), key))
            yield _problem(
                name, f"{name} is {value}, but there is nothing to evaluate on; give data.eval or data.eval_share"
            )


def _best(config: RunConfig) -> Iterator[Problem]:
    evaluation = config.eval
    often = evaluation.every_steps is not None or evaluation.every_epochs is not None
    if evaluation.patience is not None and not often:
        yield _problem(
            "eval.patience",
            f"eval.patience is {evaluation.patience}, but evaluations during training are off; give "
            "eval.every_steps or eval.every_epochs",
        )
    if config.checkpoint.best and not (often or evaluation.at_end or evaluation.at_start):
        yield _problem(
            "checkpoint.best",
            "checkpoint.best is true, but no evaluation is made; give eval.every_steps or eval.every_epochs",
        )


def _metric(config: RunConfig) -> Iterator[Problem]:
    metric, sets = config.eval.metric, config.eval.sets
    if metric is None:
        return
    of, _, rest = metric.removeprefix("eval/").partition("/")
    if not metric.startswith("eval/") or metric == "eval/":
        yield _problem(
            "eval.metric", f"eval.metric is {metric!r}, but metrics of evaluation begin with eval/, as in eval/loss"
        )
    elif sets and of not in sets and not _has_default_set(config):
        named = f"there is no set {of!r}{did_you_mean(of, sets)}" if rest else "it is about data.eval, which is not set"
        yield _problem(
            "eval.metric",
            f"eval.metric is {metric!r}, but {named}; name one of the sets, as in eval/{next(iter(sets))}/reward",
        )
    elif config.eval.mode is None and metric_mode(metric, sets) is None:
        yield _problem(
            "eval.metric",
            f"eval.metric is {metric!r}, whose name does not tell whether less or more is better; set eval.mode to "
            "min or max",
        )


def _sampling(config: RunConfig) -> Iterator[Problem]:
    """Several greedy answers to a prompt would be one."""
    whole = config.eval
    settings = {"eval": (whole.num_samples, whole.temperature)} if _has_default_set(config) or not whole.sets else {}
    for name in whole.sets:
        one = whole.of_set(name)
        settings[f"eval.sets.{name}"] = (one.num_samples or 1, one.temperature)
    for where, (num_samples, temperature) in settings.items():
        if num_samples > 1 and temperature == 0:
            yield _problem(
                f"{where}.num_samples",
                f"{where}.num_samples is {num_samples}, but at {where}.temperature 0 all completions of a prompt "
                "are the same; use 1, or raise the temperature",
            )


def _problem(path: str, text: str) -> Problem:
    return Problem(tuple(path.split(".")), text)
