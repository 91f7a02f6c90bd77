"""Methods as data: which columns are annotated, how credit is given, which terms make the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from whet.batch import WeightKind
from whet.credit import CREDITS, Credit
from whet.errors import ConfigError
from whet.losses import LOSSES, Loss


@dataclass(frozen=True)
class Annotate:
    """Forward only: write output `output` of the model in `role` to the column `writes`."""

    role: str
    output: str
    writes: str


@dataclass(frozen=True)
class Term:
    """One summand of the loss: coef * sum(values * weights)."""

    name: str
    loss: Loss
    weight: WeightKind
    coef: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def outputs(self) -> frozenset[str]:
        """Model outputs that this term needs with its options."""
        extra = [names for option, names in self.loss.outputs_if.items() if self.options.get(option)]
        return self.loss.outputs.union(*extra)


@dataclass(frozen=True)
class CreditStage:
    """A credit rule with its options."""

    name: str
    rule: Credit
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """What one training step does with a batch. `source` says where units come from."""

    name: str
    source: Literal["rows", "prompts"]
    terms: tuple[Term, ...]
    annotate: tuple[Annotate, ...] = ()
    credit: tuple[CreditStage, ...] = ()
    roles: tuple[str, ...] = ("policy",)

    @property
    def provides(self) -> frozenset[str]:
        """Columns that the source writes."""
        return frozenset({"rewards", "sampler_logprobs"}) if self.source == "prompts" else frozenset()

    def with_terms(self, terms: Iterable[Term]) -> Method:
        return replace(self, terms=tuple(terms))


METHODS: dict[str, Method] = {
    "sft": Method("sft", "rows", terms=(Term("sft", LOSSES["sft"], "token"),)),
    "grpo": Method(
        "grpo",
        "prompts",
        credit=(CreditStage("grpo", CREDITS["grpo"]),),
        terms=(Term("ppo_clip", LOSSES["ppo_clip"], "sequence"),),
    ),
}
"""Built-in methods by name; a configuration may change terms, credit and annotations."""


def check(method: Method) -> None:
    """Every column that a stage or loss reads must have been written before it.

    Raises ConfigError naming the stage, the column and what could write it.
    """
    have = set(method.provides)
    for stage in method.annotate:
        have.add(stage.writes)
    for stage in method.credit:
        _need(f"credit {stage.name!r}", stage.rule.reads, have, method)
        have |= stage.rule.writes
    for term in method.terms:
        _need(f"loss {term.name!r}", term.loss.reads, have, method)


def _need(who: str, reads: frozenset[str], have: set[str], method: Method) -> None:
    if missing := sorted(reads - have):
        raise ConfigError(
            f"{who} reads {', '.join(missing)}, which nothing in method {method.name!r} writes before it "
            f"(there is {', '.join(sorted(have)) or 'nothing'}); add the stage that writes it or choose another loss"
        )
