"""Launch scripts, read and never run: arrays and variables are put in, and the commands come out word by word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from whet.errors import ConfigError

_ASSIGNED = re.compile(r"([A-Za-z_]\w*)(\+?)=", re.ASCII)
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*|[0-9@*#?])|\{([^{}]*)\})", re.ASCII)
_EXPANSION = re.compile(r"(?P<name>[A-Za-z_]\w*|[0-9@*])(?P<items>\[[@*]\])?(?:(?P<sign>:?[-=+])(?P<other>.*))?", re.S)
_KEYWORDS = {"if", "then", "elif", "else", "fi", "for", "while", "until", "do", "done", "case", "esac", "{", "}", "!"}
_BRANCHES = {"if", "elif", "for", "while", "until", "case"}
_OWN_FOLDER = re.compile(r"dirname\b.*(?:BASH_SOURCE|\$0|\$\{0\})[^/]*((?:/\.\.)*)", re.S)
_SEPARATORS = ("&&", "||", ";;", ";", "|", "&")
_HERE = re.compile(r"\d?<<-?[ \t]*['\"]?(\w+)['\"]?")
_REDIRECT = re.compile(r"[\d&]?(?:>>|>\||>|<<<|<)(?:(&[\d-]+)|[ \t]*)")


@dataclass(frozen=True)
class Word:
    """One word of a command, and where it was written: in the command itself, or in an array that it names."""

    text: str
    file: str
    line: int
    unknown: tuple[str, ...] = ()
    """What the script takes from elsewhere: variables that it does not set, output of other commands."""

    @property
    def source(self) -> str:
        return f"{self.file}, line {self.line}"


@dataclass
class Script:
    """What a script holds."""

    file: str
    commands: list[list[Word]] = field(default_factory=list)
    arrays: dict[str, list[Word]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """Files that it reads in (`source`) which are not there."""
    branches: list[int] = field(default_factory=list)
    """Lines of conditions and loops; all of them are read as if they were gone through once."""


@dataclass(frozen=True)
class _Part:
    """A stretch of a word. Unquoted, what a variable holds is split into words."""

    text: str
    quoted: bool
    literal: bool


@dataclass(frozen=True)
class _Raw:
    """A word as it stands in the file. `mark` is an operator: a newline, `;`, a parenthesis."""

    parts: tuple[_Part, ...]
    line: int
    mark: str = ""

    @property
    def start(self) -> str:
        """What the word begins with, before any variable or quote."""
        return self.parts[0].text if self.parts and self.parts[0].literal and not self.parts[0].quoted else ""


def read_script(path: str) -> Script:
    """The commands and arrays of a bash script, with what is in its variables in their place.

    Files that it sources are read as well where they are there. Raises ConfigError with the line where a quote
    or a parenthesis is never closed, and for a file that cannot be read.
    """
    script = Script(path)
    _Reader(script, {}).read(path)
    return script


class _Reader:
    """Goes through a script from top to bottom."""

    def __init__(self, script: Script, variables: dict[str, Word]) -> None:
        self.script = script
        self.variables = variables
        self.depth = 0

    def read(self, path: str) -> None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"cannot read {path}: {reason}") from error
        for statement in _statements(path, list(_words(path, text))):
            self._do(path, statement)

    def _do(self, path: str, statement: list[_Raw]) -> None:
        while statement and statement[0].start in _KEYWORDS and len(statement[0].parts) == 1:
            if statement[0].start in _BRANCHES:
                self.script.branches.append(statement[0].line)
            statement = statement[1:]
        if statement and statement[0].start in ("export", "local", "readonly", "declare"):
            statement = statement[1:]
        statement = self._assign(path, statement)
        if not statement:
            return
        words = [word for raw in statement for word in self._expand(path, raw)]
        if words and words[0].text in ("source", ".") and len(words) > 1:
            self._source(path, words[1])
        elif words:
            self.script.commands.append(words)

    def _assign(self, path: str, statement: list[_Raw]) -> list[_Raw]:
        """Take the assignments off the front of a statement."""
        while statement:
            raw, rest = statement[0], statement[1:]
            match = _ASSIGNED.match(raw.start)
            # `NAME += ( … )`, as documentation prints it; bash itself wants no blanks.
            spaced = len(rest) > 1 and rest[0].start in ("+=", "=") and rest[1].mark == "(" and raw.start.isidentifier()
            if match is None and not spaced:
                return statement
            name = match[1] if match else raw.start
            adds = bool(match[2]) if match else rest[0].start == "+="
            rest = rest[1:] if spaced else rest
            if rest and rest[0].mark == "(" and (spaced or raw.start == match[0] if match else True):
                end = next(i for i, one in enumerate(rest) if one.mark == ")")
                items = [word for one in rest[1:end] for word in self._expand(path, one)]
                self.script.arrays[name] = [*(self.script.arrays.get(name, []) if adds else []), *items]
                statement = rest[end + 1 :]
                continue
            assert match is not None, "only an array is assigned with blanks"
            value = self._joined(path, _without(raw, len(match[0])))
            before = self.variables.get(name) if adds else None
            text = (before.text if before else "") + value.text
            self.variables[name] = replace(value, text=text)
            statement = rest
        return statement

    def _source(self, path: str, word: Word) -> None:
        folder = Path(path).parent
        found = next((one for one in (Path(word.text), folder / word.text) if one.is_file()), None)
        if found is None or word.unknown:
            self.script.missing.append(f"{word.text} ({word.source})")
        elif self.depth < 8:
            self.depth += 1
            self.read(str(found))
            self.depth -= 1

    def _joined(self, path: str, raw: _Raw) -> Word:
        """A word that is not split: what stands behind `NAME=`."""
        quoted = replace(raw, parts=tuple(replace(part, quoted=True) for part in raw.parts))
        words = self._expand(path, quoted)
        unknown = tuple(dict.fromkeys(name for word in words for name in word.unknown))
        return Word(" ".join(word.text for word in words), path, raw.line, unknown)

    def _expand(self, path: str, raw: _Raw) -> list[Word]:
        """The words that one word of the file becomes."""
        words: list[Word] = []
        text: str | None = None  # of the word that has begun
        unknown: dict[str, None] = {}
        for part in raw.parts:
            if part.literal:
                text = (text or "") + part.text
                continue
            value, lost = self._value(path, part.text)
            unknown |= dict.fromkeys(lost)
            if isinstance(value, list):  # the items of an array are words of their own
                words += [Word(text, path, raw.line)] if text is not None else []
                words, text = words + value, None
                continue
            for index, piece in enumerate([value] if part.quoted else value.split()):
                if index:
                    words.append(Word(str(text), path, raw.line, tuple(unknown)))
                    text = None
                text = (text or "") + piece
        return words if text is None else [*words, Word(text, path, raw.line, tuple(unknown))]

    def _value(self, path: str, expression: str) -> tuple[str | list[Word], list[str]]:
        """What `$…` stands for: a text, or the items of an array; and what of it the script does not say."""
        if expression.startswith("("):
            own = _OWN_FOLDER.search(expression)
            return (str(Path(path).parent) + own[1], []) if own else (f"${expression}", [f"${expression}"])
        match = _EXPANSION.fullmatch(expression)
        if match is None:
            return f"${{{expression}}}", [f"${{{expression}}}"]
        name = match["name"]
        items = self.script.arrays.get(name)
        if items is not None and match["items"]:
            return items, []
        if name in self.variables:
            held = self.variables[name]
            return held.text, list(held.unknown)
        if items is not None:
            return items[0].text if items else "", []
        if match["sign"] in ("-", ":-", "=", ":="):
            word = self._joined(path, _Raw(tuple(_parts(match["other"] or "")), 0))
            return word.text, list(word.unknown)
        if match["items"] or match["sign"] in ("+", ":+"):
            return "", []
        return f"${{{name}}}", [f"${{{name}}}"]


def _without(raw: _Raw, count: int) -> _Raw:
    first = replace(raw.parts[0], text=raw.parts[0].text[count:])
    return replace(raw, parts=(first, *raw.parts[1:]) if first.text else raw.parts[1:])


def _statements(path: str, words: Sequence[_Raw]) -> Iterator[list[_Raw]]:
    """Words up to a newline or an operator; an array goes on until its parenthesis closes."""
    statement: list[_Raw] = []
    opened: _Raw | None = None
    for word in words:
        if word.mark == "(" and opened is None:
            opened = word
        elif word.mark == ")":
            opened = None if opened is not None else opened
        elif word.mark:
            if opened is None:
                yield statement
                statement = []
            continue
        statement.append(word)
    if opened is not None:
        raise ConfigError(f"{path}, line {opened.line}: the parenthesis is never closed")
    yield statement


def _words(path: str, text: str) -> Iterator[_Raw]:
    """The words and operators of a file, without comments, redirections and texts that stand under a command."""
    position, line = 0, 1
    ends: list[str] = []  # of the texts that begin on the next line
    while position < len(text):
        start, character = position, text[position]
        if text.startswith(("\\\n", "\\\r\n"), position):
            position = text.index("\n", position) + 1
        elif character in " \t\r":
            position += 1
        elif character == "#":
            position = _line_end(text, position)
        elif character == "\n":
            yield _Raw((), line, "\n")
            position = _behind(text, position + 1, ends)
            ends = []
        elif here := _HERE.match(text, position):
            ends.append(here[1])
            position = here.end()
        elif redirect := _REDIRECT.match(text, position):
            position = redirect.end() if redirect[1] else _end_of_word(path, text, redirect.end(), line)
        elif operator := next((one for one in ("(", ")", *_SEPARATORS) if text.startswith(one, position)), None):
            yield _Raw((), line, operator)
            position += len(operator)
        else:
            position = _end_of_word(path, text, position, line)
            yield _Raw(tuple(_parts(text[start:position])), line)
        line += text.count("\n", start, position)


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _behind(text: str, position: int, ends: Sequence[str]) -> int:
    """Behind the texts that begin here, each of which goes on until a line that holds its end alone."""
    for end in ends:
        while position < len(text):
            first, position = position, min(len(text), _line_end(text, position) + 1)
            if text[first:position].strip() == end:
                break
    return position


def _end_of_word(path: str, text: str, position: int, line: int) -> int:
    """Where a word ends: at a blank or an operator that is in no quotes and in no `$( )`."""
    start = position
    while position < len(text) and text[position] not in " \t\r\n;&|()":
        position = _end_of_piece(text, position)
        if position < 0:
            raise ConfigError(
                f"{path}, line {line}: a quote or bracket in this word is never closed: {text[start : start + 40]!r}"
            )
    return position


def _end_of_piece(text: str, position: int) -> int:
    """Behind one character, one quoted text or one `$( )`; -1 where it is never closed."""
    character = text[position]
    if character == "\\":
        return position + 2
    if character == "'":
        return text.find("'", position + 1) + 1 or -1
    if character == '"':
        position += 1
        while position < len(text) and text[position] != '"':
            position = _end_of_piece(text, position) if text[position] in "\\$`" else position + 1
            if position < 0:
                return -1
        return position + 1 if position < len(text) else -1
    if character == "`":
        return text.find("`", position + 1) + 1 or -1
    if text.startswith(("$(", "${"), position):
        return _end_of_brackets(text, position + 1)
    return position + 1


def _end_of_brackets(text: str, position: int) -> int:
    opening = text[position]
    closing = {"(": ")", "{": "}"}[opening]
    position += 1
    while position < len(text) and text[position] != closing:
        nested = text[position] == opening
        position = _end_of_brackets(text, position) if nested else _end_of_piece(text, position)
        if position < 0:
            return -1
    return position + 1 if position < len(text) else -1


def _parts(word: str, quoted: bool = False) -> Iterator[_Part]:
    """The stretches of a word: plain text, quoted text, and what `$` stands before (without the `$`)."""
    position, plain = 0, ""
    while position < len(word):
        end = _end_of_piece(word, position) if not (quoted and word[position] in "'\"") else position + 1
        piece = word[position:end]
        if piece.startswith("\\") and len(piece) > 1:
            plain += "" if piece[1] == "\n" else piece[1] if not quoted or piece[1] in '$`"\\' else piece
        elif match := _VARIABLE.match(word, position):
            end = match.end() if not piece.startswith("${") else end
            yield from [_Part(plain, quoted, True)] if plain else []
            plain = ""
            yield _Part(match[1] or piece[2:-1], quoted, False)
        elif piece.startswith("`"):
            yield from [_Part(plain, quoted, True)] if plain else []
            plain = ""
            yield _Part(f"({piece[1:-1]})", quoted, False)
        elif piece.startswith(("$(", "${")):
            yield from [_Part(plain, quoted, True)] if plain else []
            plain = ""
            yield _Part(piece[1:] if piece[1] == "(" else piece[2:-1], quoted, False)
        elif not quoted and piece[0] in "'\"":
            yield from [_Part(plain, quoted, True)] if plain else []
            plain = ""
            yield from (
                [_Part(piece[1:-1], True, True)] if piece[0] == "'" or len(piece) == 2 else _parts(piece[1:-1], True)
            )
        else:
            plain += piece
        position = end
    if plain:
        yield _Part(plain, quoted, True)


def flags_of(words: Sequence[Word]) -> tuple[dict[str, list[Word]], list[Word]]:
    """`--name value value` as the words behind each name (with the flag's own word first), and words before any flag.

    Names have underscores. A name given again replaces the earlier one, as argparse has it.
    """
    flags: dict[str, list[Word]] = {}
    loose: list[Word] = []
    current: list[Word] | None = None
    for word in words:
        if word.text.startswith("--") and len(word.text) > 2:
            name, has_value, value = word.text[2:].partition("=")
            current = [word, *([replace(word, text=value)] if has_value else [])]
            flags[name.replace("-", "_")] = current
        elif word.text == "...":
            continue  # documentation leaves out the rest with it
        elif current is None:
            loose.append(word)
        else:
            current.append(word)
    return flags, loose


def command_with(script: Script, names: Mapping[str, object] | Sequence[str]) -> tuple[list[Word], int] | None:
    """The last command that holds one of these words, or a path that ends in it, and at which place."""
    for command in reversed(script.commands):
        for index, word in enumerate(command):
            if word.text.rpartition("/")[2] in names:
                return command, index
    return None
