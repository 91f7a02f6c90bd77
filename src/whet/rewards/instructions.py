"""Instructions whose following can be verified: the 25 kinds of IFEval, each a function of the response.

Source: Zhou et al. 2023 (arXiv:2311.07911), table 1.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.config.names import did_you_mean
from whet.rewards.language import LANGUAGES, is_in
from whet.rewards.prose import paragraphs, sentences, words

KINDS: dict[str, Callable[..., bool]] = {}
"""`family:kind` -> a function of the response; its keyword-only parameters are those of the instruction."""
RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda count, number: count >= number,
    "at most": lambda count, number: count <= number,
    "less than": lambda count, number: count < number,
    "more than": lambda count, number: count > number,
    "exactly": lambda count, number: count == number,
}
_FENCE = re.compile(r"\s*```\w*\s*\n(.*?)\n?\s*```\s*", re.S)
_ANSWERS = ("my answer is yes.", "my answer is no.", "my answer is maybe.")


def kind(name: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Enter a function into KINDS."""

    def enter(function: Callable[..., bool]) -> Callable[..., bool]:
        KINDS[name] = function
        return function

    return enter


@dataclass(frozen=True)
class Instruction:
    """One instruction with its arguments."""

    name: str
    arguments: Mapping[str, Any]

    def followed(self, response: str) -> bool:
        """Whether a response follows it; an empty one follows none."""
        return bool(response.strip()) and KINDS[self.name](response, **self.arguments)


def instructions(metadata: Mapping[str, Any]) -> list[Instruction]:
    """The instructions of a row: `instruction_id_list`, and `kwargs` with the arguments of each.

    Arguments that are None count as not given. Raises ValueError for what is missing, unknown or of the wrong type.
    """
    names, arguments = metadata.get("instruction_id_list"), metadata.get("kwargs")
    if not isinstance(names, Sequence) or isinstance(names, str) or not names:
        raise ValueError(f"metadata.instruction_id_list is {names!r:.80}, expected a list of instructions")
    arguments = arguments if arguments is not None else [{}] * len(names)
    if not isinstance(arguments, Sequence) or isinstance(arguments, str) or len(arguments) != len(names):
        raise ValueError(f"metadata.kwargs is {arguments!r:.80}, expected a list with one entry per instruction")
    return [_instruction(name, given or {}) for name, given in zip(names, arguments, strict=True)]


def _instruction(name: Any, given: Mapping[str, Any]) -> Instruction:
    if name not in KINDS:
        raise ValueError(f"there is no instruction {name!r}{did_you_mean(str(name), KINDS)}")
    given = {argument: value for argument, value in given.items() if value is not None}
    parameters = inspect.signature(KINDS[name]).parameters
    wanted = {one.name: str(one.annotation) for one in parameters.values() if one.kind is one.KEYWORD_ONLY}
    if set(given) != set(wanted):
        raise ValueError(f"instruction {name!r} has the arguments {sorted(given)}, expected {sorted(wanted)}")
    for argument, type_name in wanted.items():
        given[argument] = _typed(name, argument, type_name, given[argument])
    return Instruction(name, given)


def _typed(name: str, argument: str, type_name: str, value: Any) -> Any:
    """An argument as its parameter wants it: numbers come as floats out of some files."""
    if type_name == "int" and isinstance(value, float) and value.is_integer():
        value = int(value)
    right = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "str": isinstance(value, str) and bool(value),
        "list[str]": isinstance(value, list) and bool(value) and all(isinstance(one, str) and one for one in value),
    }[type_name]
    if not right:
        raise ValueError(f"instruction {name!r}: {argument} is {value!r:.80}, expected {type_name}")
    if argument.endswith("relation") and value not in RELATIONS:
        raise ValueError(f"instruction {name!r}: {argument} is {value!r:.80}, expected one of {', '.join(RELATIONS)}")
    if argument == "language" and value not in LANGUAGES:
        raise ValueError(f"instruction {name!r}: no language {value!r:.80}; known are {', '.join(sorted(LANGUAGES))}")
    return value


# Keywords.


@kind("keywords:existence")
def has_keywords(response: str, *, keywords: list[str]) -> bool:
    return all(keyword.lower() in response.lower() for keyword in keywords)


@kind("keywords:frequency")
def has_keyword_often(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return RELATIONS[relation](response.lower().count(keyword.lower()), frequency)


@kind("keywords:forbidden_words")
def lacks_words(response: str, *, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", response, re.IGNORECASE) for word in forbidden_words)


@kind("keywords:letter_frequency")
def has_letter_often(response: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return RELATIONS[let_relation](response.lower().count(letter.lower()), let_frequency)


# Language.


@kind("language:response_language")
def is_in_language(response: str, *, language: str) -> bool:
    return is_in(response, language)


# Length.


@kind("length_constraints:number_words")
def has_words(response: str, *, num_words: int, relation: str) -> bool:
    return RELATIONS[relation](len(words(response)), num_words)


@kind("length_constraints:number_sentences")
def has_sentences(response: str, *, num_sentences: int, relation: str) -> bool:
    return RELATIONS[relation](len(sentences(response)), num_sentences)


@kind("length_constraints:number_paragraphs")
def has_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    """Paragraphs are separated by `***`; before the first and after the last one there may be a separator too."""
    pieces = [piece.strip() for piece in re.split(r"\s?\*\*\*\s?", response)]
    inner = pieces[not pieces[0] : len(pieces) - (not pieces[-1])]
    return all(inner) and len(inner) == num_paragraphs


@kind("length_constraints:nth_paragraph_first_word")
def has_paragraph_beginning(response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by an empty line; the first is number 1."""
    pieces = paragraphs(response)
    if len(pieces) != num_paragraphs or not 1 <= nth_paragraph <= len(pieces):
        return False
    wanted, given = words(first_word.lower()), words(pieces[nth_paragraph - 1].lower())
    return given[: len(wanted)] == wanted


# Content.


@kind("detectable_content:number_placeholders")
def has_placeholders(response: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]]+\]", response)) >= num_placeholders


@kind("detectable_content:postscript")
def has_postscript(response: str, *, postscript_marker: str) -> bool:
    """The marker begins a line, with or without spaces between its letters."""
    letters = r"\s?".join(re.escape(letter) for letter in postscript_marker.replace(" ", ""))
    return re.search(rf"^\s*{letters}.*\S", response, re.IGNORECASE | re.M) is not None


# Format.


@kind("detectable_format:number_bullet_lists")
def has_bullets(response: str, *, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*(?!\*)|-)\s*[^\s*-].*$", response, re.M)) == num_bullets


@kind("detectable_format:constrained_response")
def gives_one_of_three_answers(response: str) -> bool:
    return any(answer in response.lower() for answer in _ANSWERS)


@kind("detectable_format:number_highlighted_sections")
def has_highlights(response: str, *, num_highlights: int) -> bool:
    """Text between single or double asterisks, on one line."""
    double = re.findall(r"\*\*([^\n*]+)\*\*", response)
    single = re.findall(r"(?<!\*)\*([^\n*]+)\*(?!\*)", re.sub(r"\*\*[^\n*]+\*\*", " ", response))
    return sum(bool(text.strip()) for text in (*double, *single)) >= num_highlights


@kind("detectable_format:multiple_sections")
def has_sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    """Sections begin with a word and a number, as in `Section 2`."""
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter.strip())}\s?\d+", response)) >= num_sections


@kind("detectable_format:json_format")
def is_json(response: str) -> bool:
    """The whole response, or the fenced block that it consists of."""
    fenced = _FENCE.fullmatch(response)
    try:
        json.loads(fenced[1] if fenced else response)
    except (ValueError, RecursionError):
        return False
    return True


@kind("detectable_format:title")
def has_title(response: str) -> bool:
    return any(text.strip(" <>") for text in re.findall(r"<<([^\n]+?)>>", response))


# Combination.


@kind("combination:two_responses")
def gives_two_responses(response: str) -> bool:
    """Two different texts, with six asterisks between them."""
    pieces = [piece.strip() for piece in response.split("******")]
    inner = pieces[not pieces[0] : len(pieces) - (not pieces[-1])]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


@kind("combination:repeat_prompt")
def repeats_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    """First word for word; then the answer."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


# Beginning and end.


@kind("startend:end_checker")
def ends_with(response: str, *, end_phrase: str) -> bool:
    return response.strip().strip('"').rstrip().lower().endswith(end_phrase.strip().lower())


@kind("startend:quotation")
def is_quoted(response: str) -> bool:
    text = response.strip()
    return len(text) > 2 and text[0] == text[-1] == '"'


# Case.


@kind("change_case:capital_word_frequency")
def has_capital_words(response: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Words of capital letters alone."""
    count = sum(word.isupper() for word in re.findall(r"[\w'’-]+", response))
    return RELATIONS[capital_relation](count, capital_frequency)


@kind("change_case:english_capital")
def is_english_in_capitals(response: str) -> bool:
    return response.isupper() and is_in(response, "en")


@kind("change_case:english_lowercase")
def is_english_in_small_letters(response: str) -> bool:
    return response.islower() and is_in(response, "en")


# Punctuation.


@kind("punctuation:no_comma")
def has_no_comma(response: str) -> bool:
    return "," not in response
