"""From a configuration to a method: which terms, which credit, which annotations, with options checked."""

from __future__ import annotations

from dataclasses import replace

from whet.config.base import Plugin
from whet.config.names import did_you_mean
from whet.config.plugin import resolve, validated_options
from whet.config.run import LossConfig, RunConfig
from whet.credit import CREDITS, Credit
from whet.errors import ConfigError
from whet.losses import LOSSES, Loss
from whet.methods import METHODS, Annotate, CreditStage, Method, Term, check

WEIGHTS_OF = {"token": ("token", "sequence", "fixed_length"), "sequence": ("row",), "pair": ("pair",)}
"""Weights that go with a loss, by what one of its values stands for; the first is the default."""


def method_of(config: RunConfig) -> Method:
    """The method that a configuration describes, ready to run.

    Raises ConfigError for unknown losses, credit rules or options, for weights that do not go with a loss,
    and for a column that nothing writes.
    """
    if config.method not in METHODS:
        known = ", ".join(METHODS)
        raise ConfigError(f"method is {config.method!r}, expected one of {known}{did_you_mean(config.method, METHODS)}")
    method = METHODS[config.method]
    method = replace(method, terms=_terms(config, method))
    if config.credit is not None:
        method = replace(method, credit=(_credit(config.credit),))
    _check_group_size(config, method)
    if config.method != "sft" and config.kl.coef:
        method = _with_kl(method, config)
    if config.entropy_coef:
        bonus = Term("entropy_bonus", LOSSES["entropy_bonus"], method.terms[0].weight, config.entropy_coef)
        method = replace(method, terms=(*method.terms, bonus))
    if method.source == "prompts" and config.rollout.optimizer_steps > 1:
        # With one optimizer step the old policy is the current one, and this pass would be wasted.
        method = replace(method, annotate=(Annotate("policy", "logprobs", "old_logprobs"), *method.annotate))
    check(method)
    return method


def _terms(config: RunConfig, method: Method) -> tuple[Term, ...]:
    if config.terms is not None:
        if config.loss:
            raise ConfigError("loss and terms are both set; put the options of loss into the entry of terms")
        return tuple(_term(one, f"terms[{i}]", None) for i, one in enumerate(config.terms))
    own = method.terms[0]
    if not config.loss:
        return method.terms
    written = LossConfig.model_validate({"use": own.name, **config.loss})
    return (_term(written, "loss", own if written.use == own.name else None), *method.terms[1:])


def _term(written: LossConfig, where: str, own: Term | None) -> Term:
    loss = resolve(written.use, LOSSES, what="loss", where=f"{where}.use")
    if not isinstance(loss, Loss):
        raise ConfigError(f"{where}.use is {written.use!r}, which is not a loss; decorate it with whet.losses.loss")
    options = validated_options(loss, written.options, where=where)
    possible = WEIGHTS_OF[loss.per]
    weight = written.weight or (own.weight if own else possible[0])
    if weight not in possible:
        raise ConfigError(
            f"{where}.weight is {weight!r}, but loss {written.use!r} gives one value per {loss.per}, which goes with "
            f"{' or '.join(possible)}"
        )
    return Term(written.use, loss, weight, written.coef, options)


def _credit(written: Plugin) -> CreditStage:
    rule = resolve(written.use, CREDITS, what="credit rule", where="credit.use")
    if not isinstance(rule, Credit):
        raise ConfigError(
            f"credit.use is {written.use!r}, which is no credit rule; decorate it with whet.credit.credit"
        )
    return CreditStage(written.use, rule, validated_options(rule, written.options, where="credit"))


def _check_group_size(config: RunConfig, method: Method) -> None:
    for stage in method.credit:
        if config.rollout.group_size < stage.rule.min_group:
            raise ConfigError(
                f"rollout.group_size is {config.rollout.group_size}, but credit {stage.name!r} needs at least "
                f"{stage.rule.min_group}; raise it"
            )


def _with_kl(method: Method, config: RunConfig) -> Method:
    term = Term("kl", LOSSES["kl"], method.terms[0].weight, config.kl.coef, {"type": config.kl.type})
    return replace(
        method,
        terms=(*method.terms, term),
        annotate=(*method.annotate, Annotate("reference", "logprobs", "ref_logprobs")),
        roles=(*method.roles, "reference"),
    )
