"""Rules between the settings of reinforcement learning: credit, KL, correction, critic, mixture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from whet.config.algorithm import CorrectionConfig, CriticConfig, MixConfig
from whet.config.problems import Problem
from whet.config.roles import DistillConfig
from whet.config.run import RunConfig

CREDIT_OF: Mapping[str, str] = {
    **dict.fromkeys(("grpo", "dapo", "gspo", "cispo", "sapo"), "grpo"),
    **{"dr-grpo": "grpo_no_std", "rloo": "rloo", "remax": "remax", "ppo": "gae", "opd": "opd"},
    **{"reinforce++": "reinforce_plus_plus", "reinforce++-baseline": "reinforce_plus_plus_baseline"},
}
"""The credit rule that each method of reinforcement learning has of its own."""
REINFORCES = ("grpo", *(method for method in CREDIT_OF if method != "grpo"))
GROUP_CREDITS = ("grpo", "grpo_no_std", "rloo", "maxrl", "reinforce_plus_plus_baseline")
"""Credit rules that compare the members of a group, and so need at least two."""


def credits_of(config: RunConfig) -> tuple[str, ...]:
    """The credit rules of a run by name."""
    if config.credit is None:
        return (CREDIT_OF[config.method],) if config.method in CREDIT_OF else ()
    return tuple(one.use for one in (config.credit if isinstance(config.credit, list) else [config.credit]))


def min_group_of(config: RunConfig) -> str | None:
    """The first credit rule of a run that needs a group of two, or None."""
    return next((name for name in credits_of(config) if name in GROUP_CREDITS), None)


def algorithm_problems(config: RunConfig) -> Iterator[Problem]:
    """What does not go together in the settings of an algorithm."""
    if config.method not in REINFORCES:
        return
    yield from _kl(config)
    yield from _shaping(config)
    yield from _correction(config)
    yield from _critic(config)
    yield from _teacher(config)
    if config.mix.data is None:
        yield from _unused(config.mix, MixConfig(), "mix", "mix.data names no rows")


def _problem(path: str, text: str) -> Problem:
    return Problem(tuple(path.split(".")), text)


def _unused(given: object, default: object, section: str, why: str) -> Iterator[Problem]:
    """Settings of a section that something leaves without effect."""
    for name in type(given).model_fields:  # type: ignore[attr-defined]
        if getattr(given, name) != getattr(default, name):
            yield _problem(f"{section}.{name}", f"{section}.{name} is given, but {why}; remove it, or change that")


def _kl(config: RunConfig) -> Iterator[Problem]:
    kl = config.kl
    if kl.where == "loss" and kl.type == "k1":
        yield _problem(
            "kl.type",
            "kl.type is 'k1', whose gradient as a loss is zero on average; use k2, k3 or low_var_kl, or kl.where "
            "reward",
        )
    if kl.where == "reward" and kl.unbiased:
        yield _problem(
            "kl.unbiased",
            "kl.unbiased is true, but kl.where is 'reward', where no gradient goes through the penalty; remove it, or "
            "use kl.where loss",
        )
    if kl.where == "reward" and kl.coef and credits_of(config) == ("opd",):
        yield _problem(
            "kl.where",
            "kl.where is 'reward', but credit 'opd' reads no rewards; use kl.where loss, or another credit beside it",
        )


def _shaping(config: RunConfig) -> Iterator[Problem]:
    shaping, longest = config.shaping, config.rollout.max_tokens
    if shaping.overlong_buffer is not None and shaping.overlong_buffer > longest:
        yield _problem(
            "shaping.overlong_buffer",
            f"shaping.overlong_buffer is {shaping.overlong_buffer:g}, more than the {longest} tokens of "
            "rollout.max_tokens; lower it",
        )
    if shaping.overlong_buffer is None and shaping.overlong_coef != 1.0:
        yield _problem(
            "shaping.overlong_coef",
            f"shaping.overlong_coef is {shaping.overlong_coef:g}, but there is no shaping.overlong_buffer; give both",
        )
    if config.credit == []:
        yield _problem("credit", "credit is an empty list, so there are no advantages; name a rule or leave it out")


def _correction(config: RunConfig) -> Iterator[Problem]:
    correction = config.correction
    if correction.use is None:
        given = correction.model_copy(update={"veto": None, "opsm": None})
        yield from _unused(given, CorrectionConfig(), "correction", "correction.use is not")
        return
    if config.rollout.old_logprobs == "sampler":
        yield _problem(
            "correction.use",
            f"correction.use is {correction.use!r}, but with rollout.old_logprobs sampler the ratio of the loss is "
            "to the policy that sampled already, and nothing is left to correct; keep one",
        )
    low, high = correction.limits
    if low > high:
        yield _problem(
            "correction.low", f"correction.low is {low:g}, above correction.high ({high:g}); nothing lies between them"
        )
    if correction.use == "icepop" and correction.level != "token":
        yield _problem(
            "correction.level",
            f"correction.level is {correction.level!r}, but 'icepop' is about tokens; use correction.use mis",
        )


def _critic(config: RunConfig) -> Iterator[Problem]:
    critic, credits = config.critic, credits_of(config)
    # A rule of the user's own may read values; only the rule itself tells.
    if "gae" not in credits and all(name in (*CREDIT_OF.values(), "maxrl") for name in credits):
        yield from _unused(critic, CriticConfig(), "critic", f"credit {', '.join(credits)!r} asks no critic")
        return
    if not critic.shared and critic.coef != CriticConfig.model_fields["coef"].default:
        yield _problem(
            "critic.coef",
            f"critic.coef is {critic.coef:g}, but a critic of its own has its own optimizer, to which a factor means "
            "nothing; set critic.lr, or critic.shared",
        )
    if not critic.shared:
        return
    for name in ("path", "lr", "max_grad_norm", "warmup_steps"):
        if (value := getattr(critic, name)) != CriticConfig.model_fields[name].default:
            yield _problem(
                f"critic.{name}",
                f"critic.{name} is {value}, but critic.shared is true: the critic is a head on the policy and is "
                "trained with it; remove one of the two",
            )


def _teacher(config: RunConfig) -> Iterator[Problem]:
    distill, credits = config.distill, credits_of(config)
    if "opd" in credits:
        if distill.teacher is None:
            yield _problem("distill.teacher", "distill.teacher is missing: credit 'opd' asks a teacher")
        for name in ("lmbda", "seq_kd", "top_k"):
            if getattr(distill, name) != DistillConfig.model_fields[name].default:
                yield _problem(
                    f"distill.{name}",
                    f"distill.{name} is given, but {config.method} has no use for it: every completion is the policy's "
                    "own; remove it",
                )
    elif all(name in CREDIT_OF.values() for name in credits):
        yield from _unused(distill, DistillConfig(), "distill", f"credit {', '.join(credits)!r} asks no teacher")
