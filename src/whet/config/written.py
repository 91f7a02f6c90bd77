"""What someone wrote: settings read from a YAML file or from flags, each with its place, not yet understood."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from whet.config.names import Path, Setting, any_of, dotted, find, settings, show
from whet.errors import ConfigError


@dataclass(frozen=True)
class Written:
    """One setting as it was written: under which name, with which value, where."""

    path: Path
    value: Any
    source: str
    """`run.yaml, line 12` or `--optim.lr`."""
    inner: Mapping[Path, str] = field(default_factory=dict)
    """Sources of what lies within the value, by the path from it."""


@dataclass(frozen=True)
class Origin:
    """A file or a place in the code, with the lines of what stands in it, where known."""

    name: str
    lines: Mapping[Path, int] = field(default_factory=dict)

    def at(self, path: Path) -> str:
        return f"{self.name}, line {self.lines[path]}" if path in self.lines else self.name

    def within(self, path: Path) -> dict[Path, str]:
        depth = len(path)
        return {inner[depth:]: self.at(inner) for inner in self.lines if len(inner) > depth and inner[:depth] == path}


def settings_in(values: object, origin: Origin, at: Path = (), path: Path = ()) -> Iterator[Written]:
    """Take a mapping apart into single settings. A text in place of a section stands for its `use` or `path`.

    `at` is the place in `origin`; `path` is the name of the setting, which differs where a key is dotted.
    """
    setting = find(path)
    has_sections = not path or (setting is not None and (setting.section is not None or setting.has_entries))
    is_section = has_sections or (setting is not None and setting.open)
    if isinstance(values, dict) and is_section and (values or not path):
        for key, value in values.items():
            # Our names hold no dots or dashes; the keys of a mapping such as `data.columns` are the user's.
            parts = key.replace("-", "_").split(".") if has_sections else (key,)
            yield from settings_in(value, origin, (*at, key), (*path, *parts))
    elif values is None and setting is not None and setting.may_be_empty:
        return  # a heading with everything below it commented out
    elif isinstance(values, str) and setting is not None and setting.shorthand is not None:
        yield Written((*path, setting.shorthand), values, origin.at(at))
    else:
        yield Written(path, _spelt_out(values, setting), origin.at(at), origin.within(at))


def _spelt_out(value: object, setting: Setting | None) -> Any:
    """The value, with the texts in a list of sections spelt out as sections."""
    if setting is None or setting.shorthand is None or not isinstance(value, list):
        return value
    return [{setting.shorthand: item} if isinstance(item, str) else item for item in value]


@dataclass(frozen=True)
class Document:
    """A YAML file as it was written."""

    values: Mapping[str, Any]
    origin: Origin
    problems: Sequence[str]
    """What is wrong with its names."""


def read_yaml(path: str) -> tuple[list[Written], list[str]]:
    """The settings of a YAML file with their lines, and what is wrong with its names.

    Raises ConfigError with the line where nothing can be read: a missing or empty file, broken syntax,
    anything that is not a mapping.
    """
    document = read_document(path)
    return list(settings_in(document.values, document.origin)), list(document.problems)


def read_document(path: str) -> Document:
    """The mapping in a YAML file. Raises ConfigError as `read_yaml` does."""
    try:
        text = FilePath(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from error
    try:
        reader = _Reader(path, text)
        values = reader.read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}, line {mark.line + 1}" if mark else path
        reason = error.problem or str(error)
        if reason.startswith("but ") and error.context:
            reason = f"{error.context}, {reason}"
        raise ConfigError(f"{place}: this is not valid YAML: {reason}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: this is not valid YAML: {error}") from error
    return Document(values, Origin(path, reader.lines), reader.problems)


class _Loader(yaml.SafeLoader):
    """YAML in which names are text: `on`, `yes` and `no` before a colon are no truth values."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        return node


class _Reader:
    """Plain values of one YAML document, the line of every key and item, and what is wrong with the keys."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.lines: dict[Path, int] = {}
        self.problems: list[str] = []
        self._loader = _Loader(text)
        self._open: set[yaml.Node] = set()

    def read(self) -> dict[str, Any]:
        root = self._loader.get_single_node()
        if root is None:
            raise ConfigError(f"{self.path}: the file is empty; it needs at least `model: {{path: ...}}` (line 1)")
        if not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else f"the text {show(root.value)}"
            raise ConfigError(
                f"{self.path}, line {root.start_mark.line + 1}: settings are written `name: value`, but this is {kind}"
            )
        return self._value(root, ())

    def _value(self, node: yaml.Node, at: Path) -> Any:
        if node in self._open:
            raise ConfigError(f"{self.path}, line {node.start_mark.line + 1}: this value contains itself")
        self._open.add(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, at)
            if isinstance(node, yaml.SequenceNode):
                for index, item in enumerate(node.value):
                    self.lines[(*at, index)] = item.start_mark.line + 1
                return [self._value(item, (*at, index)) for index, item in enumerate(node.value)]
            return self._scalar(node)
        finally:
            self._open.discard(node)

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return self._loader.construct_object(node)
        except ValueError as error:  # what looks like a date or a number, and is none
            raise ConfigError(
                f"{self.path}, line {node.start_mark.line + 1}: {show(node.value)} cannot be read ({error}); "
                "put it in quotes"
            ) from error

    def _mapping(self, node: yaml.MappingNode, at: Path) -> dict[str, Any]:
        self._note_duplicates(node, at)
        self._loader.flatten_mapping(node)  # `<<: *defaults`: what is merged in comes first, so our own keys win
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = self._loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, str):
                self.lines[(*at, key)] = line
                values[key] = self._value(value_node, (*at, key))
            else:
                self.problems.append(f"{self.path}, line {line}: the name {show(key)} is not text; put it in quotes")
        return values

    def _note_duplicates(self, node: yaml.MappingNode, at: Path) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                name = dotted((*at, key.value))
                self.problems.append(
                    f"{name} is given twice in {self.path}, in line {lines[key.value]} and line {line}; keep one"
                )
            elif isinstance(key, yaml.ScalarNode):
                lines[key.value] = line


def read_flags(
    tokens: Sequence[str], annotation_of: Callable[[Path], Any], is_switch: Callable[[Path], bool]
) -> tuple[list[Written], list[str]]:
    """Flags as settings: `--name value`, `--name=value`, and `--name` alone for true.

    Dashes and underscores in names are alike. Values are read as YAML where the type that
    `annotation_of` gives for the name takes it, and as they stand elsewhere. A name alone must be a
    switch. Returns the settings and what could not be read.
    """
    written: list[Written] = []
    problems: list[str] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if not token.startswith("--") or token == "--":
            before = f" after {written[-1].source}" if written else ""
            problems.append(f"unexpected argument {token!r}{before}; a flag begins with --, a list is written '[a, b]'")
            continue
        name, has_value, text = token[2:].partition("=")
        path = tuple(name.replace("-", "_").split("."))
        if not has_value and position < len(tokens) and not tokens[position].startswith("--"):
            has_value, text = "=", tokens[position]
            position += 1
        if not has_value and not is_switch(path):
            problems.append(f"--{name} needs a value, as in --{name} VALUE")
            continue
        value = flag_value(text, annotation_of(path)) if has_value else True
        written += settings_in(value, Origin(f"--{name}"), path=path)
    return written, problems


def flag_value(text: str, annotation: Any) -> Any:
    """A flag's text as a value of that type; where its YAML reading does not fit, the text as it stands.

    Prompts hold colons and braces, and names look like numbers: only what was meant as YAML is read so.
    """
    parsed = _parsed(text)
    if annotation is not Any:
        for candidate in (parsed, text):
            try:
                TypeAdapter(annotation).validate_python(candidate)
            except ValidationError:
                continue
            return candidate
    return parsed


def _parsed(text: str) -> Any:
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        return text
    first = text.lstrip()[:1]
    if isinstance(value, str):
        return value if first in ("'", '"') else text
    if isinstance(value, dict | list):
        return value if first in ("{", "[") else text
    if value is None:
        return None if text.strip() in ("null", "~", "Null", "NULL") else text
    return value


def switch_hint(path: Path) -> str:
    """The remedy for `--no-x` where x is a setting that is true or false."""
    name = ".".join(map(str, path))
    for prefix in ("no_", "no"):
        wanted = name.removeprefix(prefix)
        near = [known for known in settings() if known == wanted or known.rpartition(".")[2] == wanted]
        if name.startswith(prefix) and near:
            return f"; write {any_of(f'--{known} false' for known in near)}"
    return ""
