"""From a YAML file and flags to one checked, frozen configuration, and back to YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError

from whet.config.aliases import alias_of
from whet.config.conversions import Refused, Unless
from whet.config.layers import Combined, combine
from whet.config.mixture import expand
from whet.config.names import Path, dotted, find, is_open, show, takes_bool
from whet.config.problems import Problem, problems_of, refuse
from whet.config.rules import violations
from whet.config.run import RunConfig
from whet.config.written import Origin, Written, read_flags, read_yaml, settings_in

UNKNOWN = "?"
"""Stands in for a setting that is required and missing, where the others are looked at nevertheless."""


@dataclass(frozen=True)
class Loaded:
    """A configuration and where its settings came from."""

    config: RunConfig
    sources: Mapping[str, str]
    """Dotted path of every setting that was given -> `run.yaml, line 12`, `--optim.lr`, `the command`."""
    notes: tuple[str, ...] = ()
    """Names that were accepted although they have no effect here, each with the reason."""


@dataclass(frozen=True)
class Inspected:
    """What can be looked at of a configuration that may have faults, and all of these faults."""

    config: RunConfig | None
    """Without its wrong settings; None where too little is left. UNKNOWN stands where a required one is missing."""
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def load(method: str | None, path: str | None, overrides: Sequence[str], *, trains: bool = True) -> Loaded:
    """Read a YAML file, put flags on top, and check everything.

    `method` is what the command says (None: the file says it, or sft). `overrides` are flags:
    `--section.key value`, `--section.key=value`, `--section.key` alone for true; false is written out.
    Within one layer a setting may be given only once, under one name. A text in place of a section
    stands for its `use` or `path`, as in `--reward math`. Without `trains`, data to train on may be missing.
    Raises ConfigError that tells all violations at once, each with its source.
    """
    return _build(method, *_read(path, overrides), trains)


def inspect(method: str | None, path: str | None, overrides: Sequence[str]) -> Inspected:
    """The same without refusing anything: for those who want to know what else is wrong.

    Raises ConfigError for a file that cannot be read.
    """
    combined, _, rest = _combined(method, *_read(path, overrides), True)
    return Inspected(rest, tuple(combined.problems), _notes(combined))


def _read(path: str | None, overrides: Sequence[str]) -> tuple[list[Sequence[Written]], list[str]]:
    """The layers of a configuration, and what is wrong with how they are written."""
    layers: list[Sequence[Written]] = []
    problems: list[str] = []
    if path is not None:
        in_file, wrong = read_yaml(path)
        layers.append(in_file)
        problems += wrong
    flags, wrong = read_flags(overrides, flag_type, _is_switch)
    layers.append(flags)
    return layers, problems + wrong


def from_values(
    values: Mapping[str, Any],
    *,
    method: str | None = None,
    where: str = "the call",
    trains: bool = True,
    defaults: Mapping[str, Any] | None = None,
) -> Loaded:
    """The same from Python: a mapping of settings, nested or dotted, under any accepted names.

    `where` stands for the source in messages, as in `TrainingConfig`. `defaults` are settings of the same
    kind that give way to `values`. Raises ConfigError that tells all violations at once.
    """
    layers = [list(settings_in(dict(given), Origin(where))) for given in (defaults or {}, values)]
    return _build(method, layers, [], trains)


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included; loading it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, width=120)


def flag_type(path: Path) -> Any:
    """What a flag's text is read as: the type of its setting, anything where only a plugin can tell."""
    alias = alias_of(path) if find(path) is None and not is_open(path) else None
    if alias is not None and len(alias.targets) == 1:
        path = tuple(alias.targets[0].split("."))
    setting = find(path)
    return Any if setting is None or setting.section is not None else setting.field.annotation


def _is_switch(path: Path) -> bool:
    """Whether a flag may stand alone. Unknown names may, so that they are reported as unknown."""
    setting = find(path)
    if setting is not None:
        return setting.section is None and takes_bool(setting.field.annotation)
    if is_open(path):
        return True
    alias, kind = alias_of(path), flag_type(path)
    return alias is None or alias.switch or (kind is not Any and takes_bool(kind))


def _build(method: str | None, layers: Sequence[Sequence[Written]], problems: Sequence[str], trains: bool) -> Loaded:
    combined, config, _ = _combined(method, layers, problems, trains)
    refuse(combined.problems)
    assert config is not None, "a failed validation has problems"
    sources = {dotted(path): source for path, source in combined.sources.items()}
    return Loaded(config, MappingProxyType(sources), _notes(combined))


def _combined(
    method: str | None, layers: Sequence[Sequence[Written]], problems: Sequence[str], trains: bool
) -> tuple[Combined, RunConfig | None, RunConfig | None]:
    """All layers as one, with everything that is wrong; the configuration, and what of it can be looked at."""
    combined = combine(layers, method or method_in(layers))
    combined.problems[:0] = problems
    combined.problems += expand(combined.values)
    if "terms" in combined.values and ("loss", "use") in combined.sources:
        for made in ("terms", "nll_coef"):
            combined.sources.setdefault((made,), combined.sources[("loss", "use")])
    if method is not None:
        _set_method(method, combined)
    combined.values.setdefault("model", {})  # so that what is missing is the path, not the section
    return combined, *_checked(combined, trains)


def _notes(combined: Combined) -> tuple[str, ...]:
    return tuple(
        f"{foreign.name} has no effect: {foreign.alias.note} (from {foreign.source})"
        for foreign in combined.foreign
        if foreign.alias.effect == "no effect"
    )


def method_in(layers: Sequence[Sequence[Written]]) -> str:
    """The method that what was written asks for, by our name of it or by another tool's; sft where none does."""
    strong, weak = None, None
    for written in (written for layer in layers for written in layer):
        alias = alias_of(written.path)
        if written.path == ("method",):
            strong = written.value
        elif alias is not None and "method" in alias.targets:
            try:
                named = alias.convert(written.value, "sft").get("method")
            except Refused:  # told when it is converted for good
                continue
            if isinstance(named, Unless):
                weak = named.value
            else:
                strong = named or strong
    return str(strong or weak or "sft")


def _set_method(method: str, combined: Combined) -> None:
    given = combined.values.get("method", method)
    if given != method:
        source = combined.source(("method",))
        # A flag wins over a file, so the same file serves several methods.
        remedies = "or remove it" if str(source).startswith("--") else f"remove it, or add --method {method}"
        combined.problems.append(
            f"method is {show(given)} (from {source}), but the command is {method}; run `whet {given}`, {remedies}"
        )
    combined.values["method"] = method
    combined.sources.setdefault(("method",), "the command")


def _checked(combined: Combined, trains: bool) -> tuple[RunConfig | None, RunConfig | None]:
    """Validate the tree and apply the rules; what is wrong is added to `combined.problems`. See `diagnose`."""
    config, rest, problems = diagnose(combined.values, trains=trains)
    combined.problems += [_with_source(problem, combined) for problem in problems]
    for foreign in combined.foreign:
        check = foreign.alias.check
        if rest is not None and check is not None and (against := check(rest, foreign.value)):
            combined.problems.append(f"{foreign.name} is {show(foreign.value)} (from {foreign.source}), {against}")
    return config, rest


def diagnose(
    values: Mapping[str, Any], *, trains: bool = True
) -> tuple[RunConfig | None, RunConfig | None, list[Problem]]:
    """The configuration of a tree of values, or None; what of it can be looked at; all that is wrong with it.

    Where some values are wrong, the rules are applied to the rest, so that all is told at once.
    """
    wrong: list[Problem] = []
    config = None
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        wrong = problems_of(error, values, RunConfig)
    rest = config if config is not None else _rest(values, wrong)
    if rest is None:
        return None, None, wrong
    untold = [
        problem
        for problem in violations(rest, trains=trains)
        if not any(_touch(problem.path, one.path) for one in wrong)
    ]
    return config, rest, [*wrong, *untold]


def _rest(values: Mapping[str, Any], wrong: Sequence[Problem]) -> RunConfig | None:
    """The configuration without its wrong settings, or None where too little is left."""
    paths = {problem.path for problem in wrong}

    def keep(node: Any, at: Path) -> Any:
        if isinstance(node, dict):
            kept = {key: keep(value, (*at, key)) for key, value in node.items() if (*at, key) not in paths}
            # What is required stands in for itself, so that the rest can be looked at.
            missing = {str(path[-1]): UNKNOWN for path in paths if path[:-1] == at and path[-1] in ("use", "path")}
            return {**missing, **kept}
        if isinstance(node, list):
            return [keep(item, (*at, index)) for index, item in enumerate(node)]
        return node

    try:
        return RunConfig.model_validate(keep(values, ()))
    except ValidationError:
        return None


def _touch(one: Path, other: Path) -> bool:
    """Whether one path lies at or beneath the other."""
    depth = min(len(one), len(other))
    return one[:depth] == other[:depth]


def _with_source(problem: Problem, combined: Combined) -> str:
    source = combined.source(problem.path)
    return f"{problem.text} (from {source})" if source else problem.text
