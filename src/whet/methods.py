"""Methods as data: which columns are annotated, how credit is given, which terms make the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from whet.annotate import Annotate, Annotation, AotPartners, KLBaseline, KLPenalty, RewardMean
from whet.batch import Part, WeightKind, weight_key
from whet.config.algorithm import METHOD_DEFAULTS
from whet.config.algorithm_rules import CREDIT_OF
from whet.config.plugin import validated_options
from whet.credit import CREDITS, Credit
from whet.errors import ConfigError
from whet.losses import LOSSES, Loss
from whet.losses.base import Output, needed
from whet.shaping import Shaping


@dataclass(frozen=True)
class Term:
    """One summand of the loss of the model in `role`: coef * sum(values * weights)."""

    name: str
    loss: Loss
    weight: WeightKind
    coef: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    on: Part = "all"
    role: str = "policy"

    @property
    def weight_key(self) -> str:
        """What the weights of this term are called in a batch."""
        return weight_key(self.weight, self.on)

    @property
    def reads(self) -> frozenset[str]:
        """Columns that this term needs."""
        return self.loss.reads if self.on == "all" else self.loss.reads | {"labels"}

    @property
    def outputs(self) -> frozenset[Output]:
        """Model outputs that this term needs with its options."""
        return needed(self.loss, self.options)


@dataclass(frozen=True)
class CreditStage:
    """A credit rule with its options."""

    name: str
    rule: Credit
    options: Mapping[str, Any] = field(default_factory=dict)


Task = Literal["sft", "preference", "unpaired", "reward", "prompts"]
"""What the rows of a method are: see docs/data.md."""


@dataclass(frozen=True)
class Method:
    """What one training step does with a batch.

    `annotate` need not name the stages that write what terms and credit read: `completed` adds those.
    `scores` methods train a score head in place of the language-model head.
    """

    name: str
    task: Task
    terms: tuple[Term, ...]
    annotate: tuple[Annotation, ...] = ()
    credit: tuple[CreditStage, ...] = ()
    scores: bool = False

    @property
    def source(self) -> Literal["rows", "prompts"]:
        """Where units come from."""
        return "prompts" if self.task == "prompts" else "rows"

    @property
    def provides(self) -> frozenset[str]:
        """Columns that the source writes; those of `ON_REQUEST` where a credit rule reads them."""
        asked = frozenset[str]().union(*(stage.rule.reads for stage in self.credit))
        return PROVIDES[self.task] | (ON_REQUEST[self.task] & asked if self.task in ON_REQUEST else frozenset())

    @property
    def roles(self) -> frozenset[str]:
        """Models that the method runs."""
        return frozenset({"policy", *self.trains}).union(*(stage.roles for stage in self.annotate))

    @property
    def trains(self) -> tuple[str, ...]:
        """Roles of the models that are trained, the policy first."""
        return tuple(dict.fromkeys(("policy", *(term.role for term in self.terms))))

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Settings that the method has of its own where they are not written, by dotted path."""
        return METHOD_DEFAULTS.get(self.name, {})

    def terms_of(self, role: str) -> tuple[Term, ...]:
        """The terms that train the model in this role."""
        return tuple(term for term in self.terms if term.role == role)

    def outputs_of(self, role: str) -> frozenset[Output]:
        """What the terms of this role need of its model."""
        return frozenset[Output]().union(*(term.outputs for term in self.terms_of(role)))

    def with_terms(self, terms: Iterable[Term]) -> Method:
        return replace(self, terms=tuple(terms))


PROVIDES: Mapping[Task, frozenset[str]] = {
    "sft": frozenset(),
    "preference": frozenset({"labels"}),
    "unpaired": frozenset({"labels"}),
    "reward": frozenset({"labels"}),
    "prompts": frozenset({"rewards", "sampler_logprobs"}),
}
"""Columns that the rows of a task always carry."""
ON_REQUEST: Mapping[Task, frozenset[str]] = {"prompts": frozenset({"baseline_rewards"})}
"""Columns that the source of a task writes when a credit rule reads them."""


def _term(name: str, weight: WeightKind, coef: float = 1.0, *, on: Part = "all", **options: Any) -> Term:
    defaults = validated_options(LOSSES[name], options, where=name)
    return Term(name, LOSSES[name], weight, coef, defaults, on)


def _preference(name: str, task: Task, loss: str, nll_coef: float = 0.0) -> Method:
    nll = (_term("nll", "token", nll_coef, on="chosen"),) if nll_coef else ()
    return Method(name, task, (_term(loss, "row" if task == "unpaired" else "pair"), *nll))


def _reinforcement(name: str, loss: str, weight: WeightKind) -> Method:
    rule = CREDIT_OF[name]
    options = validated_options(CREDITS[rule], {}, where=rule)
    return Method(name, "prompts", (_term(loss, weight),), credit=(CreditStage(rule, CREDITS[rule], options),))


_ALL = (
    Method("sft", "sft", (_term("sft", "token"),)),
    Method("reward", "reward", (_term("bradley_terry", "pair"),), scores=True),
    _preference("dpo", "preference", "sigmoid"),
    _preference("apo", "preference", "apo_zero"),
    _preference("simpo", "preference", "simpo"),
    _preference("cpo", "preference", "cpo", nll_coef=1.0),
    _preference("cpo-simpo", "preference", "simpo", nll_coef=1.0),
    _preference("orpo", "preference", "orpo", nll_coef=1.0),
    _preference("kto", "unpaired", "kto"),
    _preference("bco", "unpaired", "bco"),
    Method("gkd", "sft", (_term("gkd", "token"),)),
    Method("distill", "sft", (_term("gkd", "token", beta=0.0),)),
    _reinforcement("grpo", "ppo_clip", "sequence"),
    _reinforcement("dr-grpo", "ppo_clip", "fixed_length"),
    _reinforcement("dapo", "ppo_clip", "token"),
    _reinforcement("rloo", "reinforce", "sequence"),
    _reinforcement("reinforce++", "ppo_clip", "token"),
    _reinforcement("reinforce++-baseline", "ppo_clip", "token"),
    _reinforcement("remax", "reinforce", "sequence"),
    _reinforcement("gspo", "gspo", "sequence"),
    _reinforcement("cispo", "cispo", "token"),
    _reinforcement("sapo", "sapo", "sequence"),
    _reinforcement("ppo", "ppo_clip", "token"),
    _reinforcement("opd", "ppo_clip", "token"),
)


METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""Built-in methods by name; a configuration may change terms, credit and annotations."""

SAMPLE = Method("sample", "prompts", terms=())
"""Rejection sampling, which trains nothing: it has no place among the methods that a loop runs."""

REFERENCE = Annotate("reference", "logprobs", "ref_logprobs")
OLD = Annotate("policy", "logprobs", "old_logprobs")


def _writer(column: str, options: Mapping[str, Any]) -> tuple[Annotation, ...]:
    """The stages that write a column for a term with these options, in their order; none for most columns."""
    if column.startswith("aot_"):
        return REFERENCE, AotPartners(options.get("ld_alpha", 1.0))
    single: dict[str, Annotation] = {
        "ref_logprobs": REFERENCE,
        "old_logprobs": OLD,
        "teacher_logprobs": Annotate("teacher", "logprobs", "teacher_logprobs"),
        "values": Annotate("critic", "values", "values"),
        "kl_baseline": KLBaseline(),
        "reward_mean": RewardMean(),
        "teacher_hidden": Annotate("teacher", "hidden", "teacher_hidden"),
    }
    return (single[column],) if column in single else ()


def completed(method: Method) -> Method:
    """The method with every stage that its credit rules and terms need and that can be had without being named."""
    stages = dict.fromkeys(method.annotate)
    readers = [(stage.rule.reads, stage.options) for stage in method.credit]
    readers += [(term.reads, term.options) for term in method.terms]
    written = method.provides.union(*(stage.rule.writes for stage in method.credit))
    for reads, options in readers:
        for column in sorted(reads - written.union(*(stage.writes for stage in stages))):
            stages |= dict.fromkeys(_writer(column, options))
    # What is read by another stage comes first.
    return replace(method, annotate=tuple(sorted(stages, key=_place)))


def _place(stage: Annotation) -> int:
    if isinstance(stage, Shaping):
        return 0
    return 2 if isinstance(stage, AotPartners | KLPenalty) else 1


def check(method: Method) -> None:
    """Every column that a stage or loss reads must have been written before it.

    Raises ConfigError naming the stage, the column and what could write it.
    """
    have = method.provides.union(*(stage.writes for stage in method.annotate))
    for before, stage in zip((None, *method.credit), method.credit, strict=False):
        if before is not None and "rewards" in stage.rule.reads:
            raise ConfigError(
                f"credit: {stage.name!r} begins from the rewards and would leave nothing of what {before.name!r} made "
                "of them; give one of the two, or, after the first, one that adds to it, such as opd"
            )
        _need(f"credit {stage.name!r}", stage.rule.reads, have, method)
        have |= stage.rule.writes
    for term in method.terms:
        _need(f"loss {term.name!r}", term.reads, have, method)


def _need(who: str, reads: frozenset[str], have: frozenset[str], method: Method) -> None:
    if missing := sorted(reads - have):
        taught = any(column.startswith("teacher_") for column in missing)
        stage = "set method to gkd and distill.teacher to a model" if taught else "add the stage that writes it"
        raise ConfigError(
            f"{who} reads {', '.join(missing)}, which nothing in method {method.name!r} writes before it "
            f"(there is {', '.join(sorted(have)) or 'nothing'}); {stage} or choose another loss"
        )
