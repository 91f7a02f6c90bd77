"""From a draft to a configuration: every name is looked up in the table, and what cannot stay is set aside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from whet.config.aliases import alias_of
from whet.config.conversions import Refused
from whet.config.layers import Combined, combine, suggestion
from whet.config.loader import diagnose
from whet.config.mixture import expand, strangers
from whet.config.names import Path, dotted, find, show
from whet.config.problems import Problem, refuse
from whet.config.run import RunConfig
from whet.config.written import Written
from whet.migrate.draft import Draft, Left

_SHARED = ("seed", "output_dir", "entropy_coef")
"""Settings of ours that other tools call the same; whatever else sounds like one of ours means something else."""


@dataclass
class Imported:
    """A configuration made of another tool's file."""

    tool: str
    file: str
    method: str
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[Path, str] = field(default_factory=dict)
    config: RunConfig | None = None
    """The configuration, or None while something is missing."""
    missing: list[Problem] = field(default_factory=list)
    """What must be filled in."""
    lost: list[Left] = field(default_factory=list)
    """What has no counterpart."""
    idle: list[Left] = field(default_factory=list)
    """What has no effect here."""
    remarks: list[str] = field(default_factory=list)


def build(draft: Draft) -> Imported:
    """The configuration that a draft describes.

    Raises ConfigError where names of the file contradict each other.
    """
    given = [written for written in (_usable(one, draft) for one in draft.names.values()) if written is not None]
    origin = f"{draft.tool}'s default"
    defaults = [Written((name,), value, origin) for name, value in draft.defaults.items() if name not in draft.names]
    combined = combine([defaults, [*draft.settings, *given]], draft.method)
    refuse(combined.problems, draft.file)
    combined.values["method"] = draft.method
    combined.sources[("method",)] = draft.method_source
    result = Imported(draft.tool, draft.file, draft.method, combined.values, combined.sources)
    result.lost, result.idle, result.remarks = list(draft.lost), list(draft.idle), list(draft.remarks)
    _loss(result, combined)
    _settle(result, combined)
    _prune(result.values, (), result.sources, origin)
    return result


def _usable(written: Written, draft: Draft) -> Written | None:
    """A name that becomes a setting; one that does not is told in the draft."""
    name = str(written.path[0])
    if name in _SHARED:
        return written
    alias = alias_of((name,))

    def left(why: str) -> Left:
        return Left(name, written.value, written.source, why)

    if alias is None:
        draft.lost.append(left(f"there is no such setting{suggestion(written.path)}"))
        return None
    try:
        made = alias.convert(written.value, draft.method)
    except Refused as reason:
        draft.lost.append(left(f"it {reason}"))
        return None
    if not made:
        note = (alias.note if alias.effect != "refused" else "") or "so it is here without it"
        note = note.rpartition(" only: ")[2]  # which values are accepted is beside the point here
        draft.idle.append(left(note))
        return None
    return written


def _loss(result: Imported, combined: Combined) -> None:
    """Options that none of the losses has go; several losses become terms."""
    loss = combined.values.get("loss", {})
    for name in strangers(loss, result.method):
        use = loss.get("use", f"the loss of {result.method}")
        _drop(result, ("loss", name), f"{show(use)} has no option {name}")
    problems = expand(combined.values)
    refuse(problems, result.file)
    if "terms" in combined.values and ("loss", "use") in result.sources:
        result.sources[("terms",)] = result.sources[("nll_coef",)] = result.sources[("loss", "use")]
    if not combined.values.get("loss", True):
        del combined.values["loss"]


def _settle(result: Imported, combined: Combined) -> None:
    """Take out what does not go with the rest, until only what is missing is wrong."""
    combined.values.setdefault("model", {})
    while True:
        result.config, _, problems = diagnose(combined.values)
        removable = [problem for problem in problems if _holds(combined.values, problem.path)]
        if not removable:
            break
        for problem in removable:
            _drop(result, problem.path, problem.text)
    result.missing = problems
    if problems:
        result.config = None


def _holds(values: Any, path: Path) -> bool:
    try:
        for part in path:
            values = values[part]
    except (KeyError, IndexError, TypeError):
        return False
    return bool(path)


def _drop(result: Imported, path: Path, why: str) -> None:
    """Remove a setting and what lies beneath; each is told with where it came from."""
    node: Any = result.values
    for part in path[:-1]:
        node = node[part]
    value = node.pop(path[-1])
    depth = len(path)
    for inner in [one for one in result.sources if one[:depth] == path]:
        name, _, place = result.sources.pop(inner).rpartition(" in ")
        result.lost.append(Left(name or dotted(inner), _at(value, inner[depth:]), place, why))


def _at(value: Any, path: Path) -> Any:
    for part in path:
        if not isinstance(value, dict | list):
            return value
        value = value[part]  # type: ignore[index]
    return value


def _prune(values: dict[str, Any], at: Path, sources: Mapping[Path, str], origin: str) -> None:
    """Leave out the other tool's defaults where they are ours, and headings with nothing below them."""
    for name, value in list(values.items()):
        setting = find((*at, name))
        if setting is None or (setting.section is not None and setting.optional):
            continue  # the section is there because something in it is
        if isinstance(value, dict) and setting.section is not None:
            _prune(value, (*at, name), sources, origin)
            if not value:
                del values[name]
        elif sources.get((*at, name), "").endswith(origin) and value == setting.field.get_default(
            call_default_factory=True
        ):
            del values[name]
