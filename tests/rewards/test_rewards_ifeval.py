"""The reward `ifeval` verifies instructions as they are meant, and reads rows as data sets write them."""

from __future__ import annotations

from typing import Any

import pytest

from whet.config.rollout import RewardConfig
from whet.errors import DataError
from whet.rewards.ifeval import IFEvalReward
from whet.rewards.instructions import KINDS, Instruction, instructions
from whet.rewards.language import LANGUAGES, is_in
from whet.rewards.prose import paragraphs, sentences, words
from whet.rewards.registry import build_scorer
from whet.types import Episode, Prompt

# Instruction, arguments, a response that follows it, and responses that do not.
CASES: list[tuple[str, dict[str, Any], str, tuple[str, ...]]] = [
    ("keywords:existence", {"keywords": ["fox", "Dog"]}, "Foxes and a DOG.", ("A fox.",)),
    ("keywords:frequency", {"keyword": "fox", "frequency": 2, "relation": "at least"}, "fox, Fox", ("fox",)),
    ("keywords:frequency", {"keyword": "a.b", "frequency": 1, "relation": "less than"}, "aab", ("a.b",)),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", ("the Cat.", "cat")),
    (
        "keywords:letter_frequency",
        {"letter": "q", "let_frequency": 2, "let_relation": "less than"},
        "Quick",
        ("quick Q",),
    ),
    ("language:response_language", {"language": "de"}, "Das ist nicht mein Hund.", ("That is not my dog.", "42")),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "two words", ("one two three",)),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "Dr. Fox runs. He is 3.5 m away!",
        ("Dr. Fox runs 3.5 m.",),
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", ("a", "a *** b *** c", "a *** *** b")),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 1}, "*** a ***", ("a *** b",)),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        'One.\n\n"Weekend, at last.',
        ("Weekend.\n\nOne.", "One.\n\nTwo.\n\nWeekend.", "One.\n\nWeekends."),
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [address]", ("[name]", "[] []")),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. I run.", ("P.S.", "Bye. PS I run.")),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\n p. p. s more", ("Bye.\nP.S. more",)),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n", ("* a", "* a\n* b\n* c", "**a**\n* b")),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe.", ("Maybe.", "My answer is good.")),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b c**", ("*a*", "** **")),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        ("Section 1\na", "Section A\nSection B", "Subsection1 Subsection2"),
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', ("{'a': 1}", 'It is {"a": 1}')),
    ("detectable_format:title", {}, "<<On foxes>>\nThey run.", ("<On foxes>", "<<>>", "<< >>")),
    ("combination:two_responses", {}, "one\n******\ntwo", ("one", "one ****** one", "a ****** b ****** c", "a ******")),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it.\nFox.", ("Fox. Say it.",)),
    ("startend:end_checker", {"end_phrase": "That is all."}, 'Fox. "THAT is all."', ("That is all. Fox.",)),
    ("startend:quotation", {}, '"Fox."', ('"Fox', 'Fox "x"', '"')),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A FOX ran",
        ("a FOX ran",),
    ),
    ("change_case:english_capital", {}, "THIS IS THE FOX.", ("This IS THE FOX.", "DAS IST NICHT DER HUND.")),
    ("change_case:english_lowercase", {}, "this is the fox.", ("This is the fox.", "das ist nicht der hund.")),
    ("punctuation:no_comma", {}, "A fox ran.", ("A fox, it ran.",)),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_each_instruction_tells_what_follows_it(name: str, arguments: dict, good: str, bad: tuple[str, ...]):
    (instruction,) = instructions({"instruction_id_list": [name], "kwargs": [arguments]})
    assert instruction.followed(good)
    assert [response for response in ("", " \n", *bad) if instruction.followed(response)] == []


def test_every_instruction_has_a_case():
    assert {case[0] for case in CASES} == set(KINDS) and len(KINDS) == 25


def row(*names: str, kwargs: Any = None, **extra: Any) -> dict[str, Any]:
    return {"instruction_id_list": list(names), "kwargs": kwargs, **extra}


async def graded(response: str, metadata: dict, **options: Any) -> float:
    return IFEvalReward(**options)(Episode(Prompt("p", [1], "?", metadata=metadata), "g", 0, response=response))


async def test_all_instructions_must_be_followed_or_a_share_of_them():
    metadata = row("punctuation:no_comma", "detectable_format:title")
    assert await graded("<<Fox>> ran", metadata) == 1.0
    assert await graded("A fox ran", metadata) == 0.0
    assert await graded("A fox ran", metadata, partial=True) == 0.5
    assert await graded("<think>well, a fox</think><<Fox>> ran", metadata) == 1.0


async def test_loose_forgives_an_introduction_a_farewell_and_asterisks():
    metadata = row("startend:quotation")
    for response in ('Sure:\n"Fox."', '"Fox."\nAnything else?', 'Sure:\n"Fox."\nBye', '**"Fox."**'):
        assert await graded(response, metadata) == 0.0
        assert await graded(response, metadata, mode="loose") == 1.0
    assert await graded("Fox.\nBye", metadata, mode="loose") == 0.0


def test_rows_are_read_as_data_sets_write_them():
    columns = {"num_words": None, "relation": None, "keywords": ["a"], "frequency": None}
    found = instructions(row("keywords:existence", "punctuation:no_comma", kwargs=[columns, None]))
    assert found == [Instruction("keywords:existence", {"keywords": ["a"]}), Instruction("punctuation:no_comma", {})]
    (counted,) = instructions(row("detectable_format:number_bullet_lists", kwargs=[{"num_bullets": 3.0}]))
    assert counted.arguments == {"num_bullets": 3} and type(counted.arguments["num_bullets"]) is int


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({}, "instruction_id_list is None"),
        (row(), r"instruction_id_list is \[\]"),
        (row("punctuation:no_coma"), "did you mean punctuation:no_comma"),
        (row("keywords:existence"), r"has the arguments \[\], expected \['keywords'\]"),
        (row("punctuation:no_comma", kwargs=[{"keywords": ["a"]}]), r"has the arguments \['keywords'\], expected \[\]"),
        (row("punctuation:no_comma", kwargs=[{}, {}]), "one entry per instruction"),
        (row("keywords:existence", kwargs=[{"keywords": "a"}]), r"keywords is 'a', expected list\[str\]"),
        (row("keywords:existence", kwargs=[{"keywords": []}]), r"expected list\[str\]"),
        (row("detectable_format:number_bullet_lists", kwargs=[{"num_bullets": 1.5}]), "expected int"),
        (row("language:response_language", kwargs=[{"language": "tlh"}]), "no language 'tlh'"),
        (
            row("length_constraints:number_words", kwargs=[{"num_words": 3, "relation": "about"}]),
            "relation is 'about', expected one of at least",
        ),
    ],
)
def test_rows_that_cannot_be_verified_are_refused_beforehand(metadata: dict, told: str):
    with pytest.raises(DataError, match=told):
        build_scorer(RewardConfig(use="ifeval")).check([Prompt("p", [1], "?", metadata=metadata)])


# Language and prose.

SPOKEN = {
    "en": "The weather is nice today and I am going to the park with my dog.",
    "es": "El tiempo es muy bueno hoy y voy al parque con mi perro.",
    "pt": "O tempo está muito bom hoje e eu vou ao parque com o meu cachorro.",
    "fr": "Il fait beau aujourd’hui et je vais au parc avec mon chien.",
    "de": "Das Wetter ist heute schön und ich gehe mit meinem Hund in den Park.",
    "it": "Il tempo è bello oggi e vado al parco con il mio cane.",
    "nl": "Het weer is mooi en ik ga met mijn hond naar het park.",
    "pl": "Pogoda jest dziś ładna i idę do parku z psem.",
    "vi": "Thời tiết hôm nay đẹp và tôi đi đến công viên với con chó của tôi.",
    "sw": "Hali ya hewa ni nzuri leo na ninaenda bustanini na mbwa wangu.",
    "fi": "Sää on tänään kaunis ja minä menen puistoon koiran kanssa, mutta se ei ole iso.",
    "ru": "Сегодня хорошая погода, и я иду в парк с собакой. Мы рады.",
    "uk": "Сьогодні гарна погода, і я йду до парку з собакою.",
    "bg": "Времето днес е хубаво и отивам в парка с кучето си.",
    "ar": "الطقس جميل اليوم وأنا ذاهب إلى الحديقة مع كلبي.",
    "ur": "آج موسم اچھا ہے اور میں اپنے کتے کے ساتھ پارک میں جا رہا ہوں۔",
    "fa": "امروز هوا خوب است و من با سگم به پارک می روم.",
    "hi": "आज मौसम अच्छा है और मैं अपने कुत्ते के साथ पार्क जा रहा हूँ।",
    "mr": "आज हवामान छान आहे आणि मी माझ्या कुत्र्यासोबत उद्यानात जात आहे.",
    "ne": "आज मौसम राम्रो छ र म मेरो कुकुरसँग पार्कमा जाँदै छु।",
    "ja": "今日は天気がいいので、犬と公園に行きます。",
    "zh": "今天天气很好，我带狗去公园。",
    "ko": "오늘은 날씨가 좋아서 개와 함께 공원에 갑니다.",
    "th": "วันนี้อากาศดี",
    "he": "מזג האוויר נעים היום",
    "el": "Ο καιρός είναι ωραίος",
    "ta": "இன்று வானிலை நன்றாக உள்ளது",
    "te": "ఈరోజు వాతావరణం బాగుంది",
    "kn": "ಇಂದು ಹವಾಮಾನ ಚೆನ್ನಾಗಿದೆ",
    "ml": "ഇന്ന് കാലാവസ്ഥ നല്ലതാണ്",
    "gu": "આજે હવામાન સારું છે",
    "pa": "ਅੱਜ ਮੌਸਮ ਵਧੀਆ ਹੈ",
    "bn": "আজ আবহাওয়া ভালো",
}


@pytest.mark.parametrize("code", sorted(LANGUAGES))
def test_every_language_is_told_from_all_others(code: str):
    assert [other for other in sorted(LANGUAGES) if is_in(SPOKEN[code], other)] == [code]


def test_letters_that_only_one_language_has_decide():
    assert is_in("Эту рыбу и сыр", "ru") and not is_in("Эту рыбу и сыр", "bg")


def test_a_few_foreign_words_do_not_change_a_language():
    assert is_in("我们用 Python 写了一个程序，它叫 Fox。", "zh")
    assert is_in("The dish is called 麻婆豆腐 and it is hot.", "en")
    assert not is_in("", "en") and not is_in("1 + 1 = 2", "en")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two! Three?", 3),
        ("Wait... what?!", 2),
        ("Mr. Fox and Dr. Dog met at 3.5 km.", 1),
        ("See J. Doe et al. for more.", 1),
        ("1. First.\n2. Second.", 2),
        ('He said "Run." Then he ran.', 2),
        ("今天很好。我们走吧！", 2),
        ("It ends with etc.", 1),
        ("...", 0),
    ],
)
def test_sentences_are_counted_as_a_reader_counts_them(text: str, count: int):
    assert len(sentences(text)) == count, sentences(text)


def test_words_and_paragraphs():
    assert words("Don't stop, fox_1!") == ["Don", "t", "stop", "fox_1"]
    assert paragraphs("a\nb\n\n \n\nc\n\n") == ["a\nb", "c"]
