"""From a configuration to a method: which terms, which credit, which annotations, with options checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from whet.annotate import Annotate, KLPenalty, SamplerAsOld, TeacherTopK
from whet.config.algorithm import ShapingConfig
from whet.config.base import Plugin
from whet.config.names import did_you_mean, unique_names
from whet.config.plugin import resolve, validated_options
from whet.config.roles import ReferenceConfig
from whet.config.rules import DISTILLS
from whet.config.run import LossConfig, RunConfig
from whet.credit import CREDITS, Credit, whiten
from whet.errors import ConfigError
from whet.losses import LOSSES, Loss
from whet.losses.correction import Corrected, Correction
from whet.methods import METHODS, OLD, REFERENCE, CreditStage, Method, Term, check, completed
from whet.shaping import Shaping

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
        written = config.credit if isinstance(config.credit, list) else [config.credit]
        method = replace(method, credit=tuple(_credit(one) for one in written))
    _check_group_size(config, method)
    if method.source == "prompts":
        method = _for_rollouts(method, config)
    if config.distill.top_k is not None:
        method = _from_top_k(method, config.distill.top_k)
    if config.entropy_coef:
        weight = method.terms[0].weight if method.terms[0].loss.per == "token" else "token"
        bonus = Term("entropy_bonus", LOSSES["entropy_bonus"], weight, config.entropy_coef)
        method = replace(method, terms=(*method.terms, bonus))
    method = completed(replace(method, terms=_distinct(method.terms)))
    _check_pairs(method)
    check(method)
    _check_roles(method, config)
    return method


def _for_rollouts(method: Method, config: RunConfig) -> Method:
    """Shaping, the KL penalty, the critic, the correction, and the old policy's logprobs."""
    kl, stages = config.kl, [*_shaping(config), *method.annotate]
    old = SamplerAsOld() if _ratio_to(config) == "sampler" else OLD
    if old is not OLD or config.rollout.updates_per_step > 1:
        # With one optimizer step the old policy is the current one, and this pass would be wasted.
        stages.append(old)
    terms = [_corrected(term, config) for term in method.terms]
    if kl.coef and kl.where == "loss":
        options = {"type": kl.estimator, "unbiased": kl.unbiased}
        terms.append(Term("kl", LOSSES["kl"], method.terms[0].weight, kl.coef, options))
    elif kl.coef:
        stages += [old, REFERENCE, KLPenalty(kl.coef, kl.estimator)]
    if any("values" in stage.rule.reads for stage in method.credit):
        critic, options = config.critic, {"clip": config.critic.value_clip}
        role, coef = ("policy", critic.coef) if critic.shared else ("critic", 1.0)
        terms.append(Term("value", LOSSES["value"], "token", coef, options, role=role))
        stages.append(Annotate(role, "values", "values"))
    wanted = config.shaping.whiten
    if wanted or (wanted is None and any(stage.rule.whitened for stage in method.credit)):
        method = replace(method, credit=(*method.credit, CreditStage("whiten", whiten)))
    return replace(method, terms=tuple(terms), annotate=tuple(dict.fromkeys(stages)))


def _ratio_to(config: RunConfig) -> str:
    """Whose logprobs the ratio of the loss is to; see `rollout.old_logprobs`."""
    if config.rollout.old_logprobs is not None:
        return config.rollout.old_logprobs
    return "sampler" if config.rollout.trains_older and config.correction.use is None else "trainer"


def _shaping(config: RunConfig) -> list[Shaping]:
    shaping, longest = config.shaping, config.rollout.max_tokens
    if shaping.model_copy(update={"whiten": None}) == ShapingConfig():
        return []
    buffer = shaping.overlong_buffer
    if buffer is not None:
        buffer = max(1, round(buffer if buffer >= 1 else buffer * longest))
    transform = None
    if shaping.transform is not None:
        transform = resolve(shaping.transform, {}, what="function of rewards", where="shaping.transform")
        if not callable(transform):
            raise ConfigError(f"shaping.transform is {shaping.transform!r}, which cannot be called with rewards")
    return [
        Shaping(
            longest,
            transform,
            shaping.scale,
            shaping.clip,
            buffer,
            shaping.overlong_coef,
            shaping.mask_truncated,
        )
    ]


def _corrected(term: Term, config: RunConfig) -> Term:
    """A term that learns from advantages, weighed by the correction where there is one."""
    written = config.correction
    if (written.use is None and written.veto is None and written.opsm is None) or "advantages" not in term.reads:
        return term
    if term.loss.per != "token":
        raise ConfigError(
            f"correction weighs tokens, but loss {term.name!r} gives one value per {term.loss.per}; remove one"
        )
    correction = Correction(written.use, written.level, *written.limits, written.veto, written.opsm)
    return replace(term, loss=Corrected(term.loss, correction))


def _from_top_k(method: Method, k: int) -> Method:
    """Distillation from the teacher's likeliest tokens in place of its whole distribution."""
    loss = LOSSES["gkd_topk"]
    terms = tuple(replace(t, name="gkd_topk", loss=loss) if t.name == "gkd" else t for t in method.terms)
    temperatures = {term.options["temperature"] for term in terms if term.loss is loss}
    if len(temperatures) > 1:
        raise ConfigError("terms: several gkd losses with distill.top_k need the same temperature")
    stages = tuple(TeacherTopK(k, temperature) for temperature in temperatures)
    return replace(method, terms=terms, annotate=(*method.annotate, *stages))


def _terms(config: RunConfig, method: Method) -> tuple[Term, ...]:
    if config.terms is not None:
        if config.loss:
            raise ConfigError("loss and terms are both set; put the options of loss into the entry of terms")
        terms = [_term(one, f"terms[{i}]", None) for i, one in enumerate(config.terms)]
    else:
        terms = [_own_term(config, method.terms[0]), *(term for term in method.terms[1:] if term.name != "nll")]
    coef = config.nll_coef
    if coef is None and config.terms is None:
        coef = next((term.coef for term in method.terms if term.name == "nll"), 0.0)
    if coef:
        terms.append(Term("nll", LOSSES["nll"], "token", coef, on="chosen"))
    return tuple(terms)


def _own_term(config: RunConfig, own: Term) -> Term:
    """The method's own loss, with the options of `loss`, or the one that `loss.use` names in its place."""
    if not config.loss:
        return own
    written = LossConfig.model_validate({"use": own.name, **config.loss})
    if written.use == own.name:
        written = LossConfig.model_validate({**own.options, **config.loss, "use": own.name})
    return _term(written, "loss", own if written.use == own.name else None)


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
    if written.on != "all" and loss.per == "pair":
        raise ConfigError(f"{where}.on is {written.on!r}, but loss {written.use!r} is about pairs; leave it out")
    return Term(written.use, loss, weight, written.coef, options, written.on)


def _distinct(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Terms with names that metrics can tell apart: sft, sft-2."""
    names = unique_names([term.name for term in terms])
    return tuple(replace(term, name=name) for term, name in zip(terms, names, strict=True))


def _check_roles(method: Method, config: RunConfig) -> None:
    """A frozen model that a loss asks must be there, and one that is given must be asked."""
    if "teacher" in method.roles and config.distill.teacher is None and config.method not in DISTILLS:
        learns = ", ".join(term.name for term in method.terms if any(c.startswith("teacher_") for c in term.reads))
        who = f"loss {learns!r}" if learns else f"credit {', '.join(stage.name for stage in method.credit)!r}"
        remedy = "set distill.teacher" if method.source == "prompts" else "set method to gkd"
        raise ConfigError(f"{who} learns from a teacher, and {config.method} has none; {remedy}")
    asked = {"reference": config.reference != ReferenceConfig(), "teacher": config.distill.teacher is not None}
    for role, given in asked.items():
        if given and role not in method.roles and method.source == "rows":
            section = "reference" if role == "reference" else "distill.teacher"
            names = ", ".join(term.name for term in method.terms)
            raise ConfigError(
                f"{section} is given, but the loss ({names}) does not ask the {role} anything; remove it, or choose "
                "another loss.use"
            )


def _check_pairs(method: Method) -> None:
    paired = ("preference", "reward")
    for term in method.terms:
        if term.loss.per == "pair" and method.task not in paired:
            raise ConfigError(
                f"loss {term.name!r} compares chosen with rejected, but {method.name} has no pairs; use one of the "
                f"methods {', '.join(name for name, one in METHODS.items() if one.task in paired)}"
            )
        if ("scores" in term.outputs) != method.scores:
            needs = "a score head" if "scores" in term.outputs else "a language-model head"
            raise ConfigError(f"loss {term.name!r} needs {needs}, which {method.name} does not train; choose another")


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
