"""Rules between settings that need neither model nor data: what does not go together, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from whet.config.algorithm_rules import REINFORCES, algorithm_problems, credits_of, min_group_of
from whet.config.cluster_rules import cluster_problems
from whet.config.data import DataConfig
from whet.config.deepspeed import deepspeed_problems
from whet.config.evaluation import EvalConfig
from whet.config.evaluation_rules import OF_PROMPTS, evaluation_problems
from whet.config.megatron import megatron_problems
from whet.config.model import QuantizationConfig
from whet.config.names import did_you_mean, show
from whet.config.parallel_rules import parallel_problems
from whet.config.problems import Problem
from whet.config.roles import ReferenceConfig
from whet.config.rollout import RolloutConfig
from whet.config.rollout_rules import idle_problems, rollout_problems
from whet.config.run import RunConfig
from whet.config.sample_rules import sampling_problems
from whet.config.train import TrainConfig

PAIRED = ("dpo", "apo", "simpo", "cpo", "cpo-simpo", "orpo")
UNPAIRED = ("kto", "bco")
DISTILLS = ("gkd", "distill")
TRAINS = ("sft", "reward", *PAIRED, *UNPAIRED, *DISTILLS, *REINFORCES)
"""Methods that train a model."""
SAMPLES = ("sample",)
METHOD_NAMES = (*TRAINS, *SAMPLES)
"""Methods that can be chosen by name."""
REFERS = ("dpo", "apo", *UNPAIRED, *REINFORCES)
"""Methods that hold the policy against a reference."""
BELONGS: Mapping[str, tuple[str, ...]] = {
    "reward": (*REINFORCES, *SAMPLES),
    "credit": REINFORCES,
    "debug": REINFORCES,
    "env": REINFORCES,
    **dict.fromkeys(("kl", "shaping", "correction", "critic", "mix"), REINFORCES),
    "rollout": (*REINFORCES, *DISTILLS, *SAMPLES),
    "engine": (*REINFORCES, *DISTILLS, *SAMPLES),
    "reference": REFERS,
    "nll_coef": (*PAIRED, *UNPAIRED),
    "distill": (*DISTILLS, *REINFORCES),
    "sample": SAMPLES,
    **dict.fromkeys(("train", "optim", "eval", "checkpoint", "loss", "terms", "entropy_coef"), TRAINS),
}
"""Sections, and the methods that have a use for them."""
ROWS_FOR: Mapping[str, tuple[str, ...]] = {
    "best": ("sft", *DISTILLS),
    "all": ("sft", *DISTILLS),
    "pairs": (*PAIRED, "reward", *UNPAIRED),
    "labels": UNPAIRED,
}
"""What rejection sampling selects -> the methods that can train on it."""


def violations(config: RunConfig, *, trains: bool = True) -> list[Problem]:
    """Everything in a configuration that does not go together, in the order of the rules.

    Without `trains` (evaluation, prediction) there need be no data to train on.
    """
    rules = (_trains, _trains_quantised, *RULES) if trains else RULES
    return [problem for rule in rules for problem in rule(config)]


def _problem(path: str, text: str) -> Problem:
    return Problem(tuple(path.split(".")), text)


def _reinforces(config: RunConfig) -> bool:
    return config.method in REINFORCES


def _method(config: RunConfig) -> Iterator[Problem]:
    if config.method not in METHOD_NAMES:
        near = did_you_mean(config.method, METHOD_NAMES)
        known = ", ".join(METHOD_NAMES)
        yield _problem("method", f"method is {config.method!r}, which there is not (there is {known}){near}")


def _trains(config: RunConfig) -> Iterator[Problem]:
    if not config.data.train and config.debug.train_only is None:
        wanted = "of prompts to sample from" if config.method in SAMPLES else "to train on"
        yield _problem("data.train", f"data.train is missing: {config.method} needs a file {wanted}")


def _trains_quantised(config: RunConfig) -> Iterator[Problem]:
    if config.method in SAMPLES:
        return
    model = config.model
    # The folder of an adapter alone: it is trained on.
    is_adapter = model.adapter is not None or (Path(model.path).expanduser() / "adapter_config.json").is_file()
    if model.quantization is not None and not is_adapter:
        yield _problem(
            "model.quantization",
            f"model.quantization is given, but weights of {model.quantization.bits} bits cannot be trained themselves; "
            "add model.adapter (as in model.adapter.rank: 16), or remove model.quantization",
        )


def _needs(config: RunConfig) -> Iterator[Problem]:
    judges = config.debug.train_only is None or config.data.eval is not None or config.eval.sets
    judges = judges and credits_of(config) != ("opd",)
    if config.method in BELONGS["reward"] and judges and not config.reward:
        yield _problem("reward", f"reward is missing: {config.method} needs one, as in reward.use: math")
    if config.method in DISTILLS and config.distill.teacher is None:
        yield _problem("distill.teacher", f"distill.teacher is missing: {config.method} learns from a teacher")
    if config.terms == []:
        yield _problem("terms", "terms is an empty list, so there is no loss; name a term or leave it out")


def _belongs(config: RunConfig) -> Iterator[Problem]:
    """Settings that the method would ignore."""
    if config.method not in METHOD_NAMES:
        return
    for name, methods in BELONGS.items():
        default = RunConfig.model_fields[name].get_default(call_default_factory=True)
        if config.method not in methods and getattr(config, name) != default:
            first = methods[0]
            other = f"set method to {' or '.join(methods)}" if len(methods) < 5 else f"it goes with {first}"
            if first in REINFORCES:
                other = f"set method to {first}, or another that samples"
            yield _problem(name, f"{name} is given, but {config.method} has no use for it; remove it, or {other}")
    if _reinforces(config):
        yield from _rollouts_alone(config)
    elif config.data.max_prompt_length is not None and config.method not in SAMPLES:
        yield _problem(
            "data.max_prompt_length",
            f"data.max_prompt_length is {config.data.max_prompt_length}, but {config.method} has no use for it; "
            "data.max_length limits whole sequences",
        )


def _rollouts_alone(config: RunConfig) -> Iterator[Problem]:
    """Settings of training on rows, given to reinforcement learning."""
    if config.data.max_length != DataConfig.model_fields["max_length"].default:
        yield _problem(
            "data.max_length",
            f"data.max_length is {config.data.max_length}, but {config.method} has no use for it: "
            "data.max_prompt_length limits prompts and rollout.max_tokens completions; remove it",
        )
    for name in ("batch_size", "accumulation"):
        value = getattr(config.train, name)
        if value != TrainConfig.model_fields[name].default:
            yield _problem(
                f"train.{name}",
                f"train.{name} is {value}, but {config.method} has no use for it: a step takes "
                f"rollout.prompts_per_step ({config.rollout.prompts_per_step}) x rollout.group_size "
                f"({config.rollout.group_size}) completions; remove it",
            )


def _elsewhere(config: RunConfig) -> Iterator[Problem]:
    """Settings that something else in the configuration leaves without effect."""
    if config.method not in METHOD_NAMES:
        return
    sampled = _reinforces(config) or config.method in SAMPLES
    for name in ("batch_size",) if sampled else OF_PROMPTS:
        value = getattr(config.eval, name)
        if value != EvalConfig.model_fields[name].get_default(call_default_factory=True):
            made = "samples completions of prompts" if sampled else "computes the losses of rows"
            yield _problem(
                f"eval.{name}",
                f"eval.{name} is {show(value)}, but evaluation of {config.method} {made} and has no use for it; "
                "remove it",
            )
    if config.data.system is not None and config.data.chat == "never":
        yield _problem(
            "data.system",
            "data.system is given, but data.chat is 'never' and plain text has no system message; put it into "
            "data.prompt_template, or remove it",
        )
    reference, distill = config.reference, config.distill
    if reference.sync_steps is None and reference.sync_alpha != ReferenceConfig.model_fields["sync_alpha"].default:
        yield _problem(
            "reference.sync_alpha",
            f"reference.sync_alpha is {reference.sync_alpha}, but the reference does not move; give "
            "reference.sync_steps as well",
        )
    if distill.seq_kd and distill.lmbda == 1:
        yield _problem(
            "distill.seq_kd",
            "distill.seq_kd is true, but distill.lmbda is 1: every step trains on the policy's own completions and "
            "none on the teacher's; lower distill.lmbda, or remove it",
        )


def _distillation(config: RunConfig) -> Iterator[Problem]:
    """A teacher that samples or watches samples is there all the time; sampling takes one completion per row."""
    if config.method not in DISTILLS:
        return
    for name in ("prompts_per_step", "group_size", "optimizer_steps"):
        value = getattr(config.rollout, name)
        if value != RolloutConfig.model_fields[name].default:
            yield _problem(
                f"rollout.{name}",
                f"rollout.{name} is {value}, but {config.method} has no use for it: a step takes train.batch_size "
                "rows, with one completion each; remove it",
            )
    yield from idle_problems(config.rollout, config.method)
    # Where lmbda is written, 0 is one of several that are tried with the same configuration.
    samples = config.method == "gkd" or config.distill.lmbda is not None or config.distill.seq_kd
    if not samples and config.rollout != RolloutConfig():
        yield _problem(
            "rollout",
            "rollout is given, but distill samples nothing unless distill.lmbda or distill.seq_kd says so; remove it, "
            "or set one of them",
        )


def _reference(config: RunConfig) -> Iterator[Problem]:
    reference = config.reference
    if reference.precompute and _reinforces(config):
        yield _problem(
            "reference.precompute",
            f"reference.precompute is true, but the completions of {config.method} do not exist before they are "
            "sampled; remove it",
        )
    if reference.sync_steps is None:
        return
    if reference.precompute:
        yield _problem(
            "reference.precompute",
            "reference.precompute is true, but reference.sync_steps moves the reference while it trains; keep one",
        )
    if config.model.adapter is not None:
        yield _problem(
            "reference.sync_steps",
            f"reference.sync_steps is {reference.sync_steps}, but under model.adapter the reference is the policy with "
            "its adapter off, which cannot be moved; train all weights, or leave it out",
        )


def _groups(config: RunConfig) -> Iterator[Problem]:
    if not _reinforces(config):
        return
    rollout = config.rollout
    yield from rollout_problems(rollout, has_env=config.env is not None)
    if rollout.group_size == 1 and (comparing := min_group_of(config)):
        yield _problem(
            "rollout.group_size",
            f"rollout.group_size is 1, but credit {comparing!r} needs at least 2: it compares the completions of a "
            "prompt; raise it, or use a credit that does not (reinforce_plus_plus, remax, gae, or one of your own)",
        )
    if rollout.optimizer_steps > rollout.prompts_per_step:
        yield _problem(
            "rollout.optimizer_steps",
            f"rollout.optimizer_steps is {rollout.optimizer_steps}, but there are only {rollout.prompts_per_step} "
            "groups per step (rollout.prompts_per_step), and a group is never torn apart; lower it",
        )


def _loss(config: RunConfig) -> Iterator[Problem]:
    if config.loss and config.terms:
        yield _problem(
            "loss", "loss and terms are both given, but terms stand in place of the method's own loss; keep one"
        )


def _precision(config: RunConfig) -> Iterator[Problem]:
    if config.backend.device == "cpu" and config.backend.precision == "fp16":
        yield _problem(
            "backend.precision", "backend.precision is 'fp16', which a CPU does not train in; use bf16 or float32"
        )
    if config.backend.device == "cpu" and config.model.dtype == "float16":
        yield _problem(
            "model.dtype", "model.dtype is 'float16', which a CPU does not train in; use float32 or bfloat16"
        )
    elif config.backend.precision == "fp16" and config.model.dtype == "float16" and config.model.adapter is None:
        yield _problem(
            "model.dtype",
            "model.dtype is 'float16', but backend.precision fp16 scales the loss, which needs float32 weights to "
            "step on; use model.dtype float32",
        )


def _quantised(config: RunConfig) -> Iterator[Problem]:
    for where, quantization in (("model", config.model.quantization), ("distill", config.distill.quantization)):
        if quantization is None or quantization.bits == 4:
            continue
        for name in ("type", "double", "compute_dtype"):
            value = getattr(quantization, name)
            if value != QuantizationConfig.model_fields[name].default:
                yield _problem(
                    f"{where}.quantization.{name}",
                    f"{where}.quantization.{name} is {show(value)}, which only weights of 4 bits have, and "
                    f"{where}.quantization.bits is 8; remove it, or use 4 bits",
                )
    adapter, quantization = config.model.adapter, config.model.quantization
    if adapter is not None and adapter.dora and quantization is not None and quantization.bits == 8:
        yield _problem(
            "model.adapter.dora",
            "model.adapter.dora is true, but peft cannot take the lengths of the rows of 8-bit weights; use "
            "model.quantization.bits 4, or remove model.adapter.dora",
        )


def _schedule(config: RunConfig) -> Iterator[Problem]:
    optim, steps = config.optim, config.train.steps
    if optim.warmup_steps is not None and steps is not None and optim.warmup_steps > steps:
        yield _problem(
            "optim.warmup_steps",
            f"optim.warmup_steps is {optim.warmup_steps}, more than the {steps} steps of the run (train.steps); "
            "lower it, or use optim.warmup_ratio",
        )
    if optim.schedule == "constant" and optim.min_lr_ratio > 0:
        yield _problem(
            "optim.min_lr_ratio",
            f"optim.min_lr_ratio is {optim.min_lr_ratio}, but optim.schedule 'constant' never falls; use linear or "
            "cosine, or remove it",
        )


def _sampling(config: RunConfig) -> Iterator[Problem]:
    if "" in config.rollout.stop:
        yield _problem("rollout.stop", "rollout.stop holds an empty text, which would end every completion; remove it")


def _dumps(config: RunConfig) -> Iterator[Problem]:
    """Rollouts on disk: who writes them, and who reads them."""
    log, debug = config.log, config.debug
    if log.rollouts and not _reinforces(config):
        yield _problem(
            "log.rollouts",
            f"log.rollouts is {show(log.rollouts)}, but {config.method} samples no rollouts; remove it",
        )
    if log.keep_rollouts is not None and not log.rollouts and not debug.rollout_only:
        yield _problem(
            "log.keep_rollouts",
            f"log.keep_rollouts is {log.keep_rollouts}, but no rollouts are written; set log.rollouts to true",
        )
    if debug.train_only is None:
        return
    if debug.rollout_only:
        yield _problem(
            "debug.rollout_only",
            "debug.rollout_only is true, but debug.train_only trains on what was sampled before; keep one of the two",
        )
    if log.rollouts:
        yield _problem(
            "log.rollouts",
            f"log.rollouts is {show(log.rollouts)}, but with debug.train_only nothing is sampled; remove it",
        )
    if config.data.eval_share > 0:
        yield _problem(
            "data.eval_share",
            f"data.eval_share is {config.data.eval_share}, but with debug.train_only the prompts are not read; give "
            "data.eval or eval.sets, or remove it",
        )


RULES: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    _method,
    _needs,
    _belongs,
    _elsewhere,
    _distillation,
    _reference,
    _groups,
    parallel_problems,
    cluster_problems,
    deepspeed_problems,
    megatron_problems,
    _loss,
    _precision,
    _quantised,
    _schedule,
    _sampling,
    _dumps,
    evaluation_problems,
    sampling_problems,
    algorithm_problems,
)
