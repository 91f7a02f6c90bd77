"""What was read from another tool's file, while it becomes a configuration: names, and what is known about them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from whet.config.aliases import alias_of
from whet.config.names import any_of
from whet.config.written import Written, flag_value
from whet.errors import ConfigError
from whet.migrate.shell import Word

_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


@dataclass(frozen=True)
class Left:
    """A name that became no setting: as it was written, and why."""

    name: str
    value: Any
    source: str
    why: str


@dataclass
class Draft:
    """The names of a file on their way. What a reader knows of several names together it takes out and settles."""

    tool: str
    file: str
    names: dict[str, Written] = field(default_factory=dict)
    """Names of the tool that are still to be looked up in the table."""
    settings: list[Written] = field(default_factory=list)
    """Settings of ours that were made of them."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What the tool would have taken for names that are not given."""
    method: str = "sft"
    method_source: str = ""
    lost: list[Left] = field(default_factory=list)
    idle: list[Left] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What to look at, although nothing is wrong with it."""

    def add(self, name: str, value: object, source: str) -> None:
        """A name as it was written; `1e-6`, which YAML reads as text, is a number."""
        if isinstance(value, str) and _SCIENTIFIC.fullmatch(value.strip()):
            value = float(value)
        self.names[name] = Written((name,), value, source)

    def add_flag(self, name: str, words: Sequence[Word]) -> None:
        """A flag of a command: true by itself, a list with several words behind it.

        What the script does not say has no counterpart, but where a name has no effect or is refused, that is told.
        """
        flag, values = words[0], words[1:]
        alias = alias_of((name,))
        unknown = dict.fromkeys(part for word in values for part in word.unknown)
        if unknown and (alias is None or alias.effect == "sets"):
            self.add(name, " ".join(word.text for word in values), flag.source)
            self.lose(name, f"the script does not say what {any_of(unknown)} is; write the value yourself")
            return
        read = [flag_value(word.text, Any) for word in values]
        self.add(name, True if not read else read[0] if len(read) == 1 else read, flag.source)

    def value(self, name: str, default: Any = None) -> Any:
        """The value of a name, which stays."""
        return self.names[name].value if name in self.names else default

    def take(self, name: str) -> Written | None:
        """A name with its value, which is thereby settled."""
        return self.names.pop(name, None)

    def set(self, path: str, value: object, source: str) -> None:
        self.settings.append(Written(tuple(path.split(".")), value, source))

    def rename(self, name: str, path: str) -> None:
        """A name that is a setting of ours under another name, in this tool alone."""
        if written := self.take(name):
            self.set(path, written.value, named(name, written.source))

    def lose(self, name: str, why: str) -> None:
        """Settle a name that has no counterpart, if it is there."""
        if written := self.take(name):
            self.lost.append(Left(name, written.value, written.source, why))

    def pass_over(self, name: str, why: str) -> None:
        """Settle a name that has no effect, if it is there."""
        if written := self.take(name):
            self.idle.append(Left(name, written.value, written.source, why))

    def number(self, name: str, default: int) -> int:
        """A whole number, at least 1; ConfigError for anything else."""
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self.names[name].source}: {name} is {value!r}, expected a whole number, at least 1")
        return value


def named(name: str, source: str) -> str:
    """`learning_rate in dpo.yaml, line 4`."""
    return f"{name} in {source}"


def evaluated_every(draft: Draft, *, logging_steps: int) -> None:
    """Hugging Face's trainers that evaluate by steps do so as often as they log, unless `eval_steps` is given."""
    if draft.value("eval_strategy") == "steps":
        draft.defaults["eval_steps"] = draft.value("logging_steps", logging_steps)
