"""Which language a text is in, by its script and its commonest words; offline, for the languages listed here."""

from __future__ import annotations

import re
from collections import Counter

SCRIPTS = {
    "latin": "A-Za-zÀ-ɏḀ-ỿ",
    "cyrillic": "Ѐ-ӿ",
    "arabic": "؀-ۿݐ-ݿ",
    "devanagari": "ऀ-ॿ",
    "bengali": "ঀ-৿",
    "gurmukhi": "਀-੿",
    "gujarati": "઀-૿",
    "tamil": "஀-௿",
    "telugu": "ఀ-౿",
    "kannada": "ಀ-೿",
    "malayalam": "ഀ-ൿ",
    "thai": "฀-๿",
    "hebrew": "֐-׿",
    "greek": "Ͱ-Ͽ",
    "hangul": "가-힯ᄀ-ᇿ",
    "kana": "぀-ヿ",
    "han": "一-鿿㐀-䶿",
}
ALONE = {
    "bn": "bengali",
    "pa": "gurmukhi",
    "gu": "gujarati",
    "ta": "tamil",
    "te": "telugu",
    "kn": "kannada",
    "ml": "malayalam",
    "th": "thai",
    "he": "hebrew",
    "el": "greek",
    "ko": "hangul",
    "ja": "kana",
    "zh": "han",
}
"""Languages that have a script to themselves, as far as this list goes."""
COMMON = {
    "latin": {
        "en": "the of and to in is that it for was with as on are be this have you not they which from at his her what",
        "es": "el los las de que y en un una por con para es del se su al lo como más pero sus le ya está muy también",
        "pt": "o os as de que e do da em um uma para com não por mais dos no na se foi ao das tem seu você são também",
        "fr": "le les de des et un une est que dans pour qui sur avec pas par plus ce sont vous nous je il elle au aux",
        "de": "der die das und ist nicht ein eine zu den mit von sich auf für dem es im auch sie wir ich an werden bei",
        "it": "il di che e la un una per non sono con del della gli si è le dei nel alla da come più anche ma questo",
        "nl": "de het een en van ik te dat die in is niet zijn op aan met voor er maar om ook als dan zij bij naar",
        "pl": "i w na z do się nie że jest to o jak ale po co za przez dla od są ten tym być oraz które tego jego czy",
        "vi": "là và của có không được cho các một trong người những với này để tôi đã ở khi ra như cũng từ đến",
        "sw": "na ya wa kwa ni katika za la cha kuwa hii huo yake watu pia kama lakini sana wao sisi yangu hiyo vya",
        "fi": "ja on ei se että hän oli mutta ovat myös kun niin tai jos joka mitä sen ole voi tämä kuin minä olen",
    },
    "cyrillic": {
        "ru": "и в не на что с как это по он она но из за они мы вы у так же от бы для все был его только или ещё",
        "uk": "і в не на що з як це до та у за він вона але від які є або його для вони ми ви так було бути й також",
        "bg": "и на да е се за от в не са по с това като си ще но до че той или един те му към беше са което бъде",
    },
    "arabic": {
        "ar": "في من على إلى أن هذا هذه التي الذي عن مع ما لا هو هي كان لم ذلك بين كل أو إن كما قد بعد عند",
        "ur": "ہے میں کے کی کا اور سے کو نے پر یہ ہیں وہ کہ ایک تھا بھی نہیں ہو اس گیا لیے ہم آپ تو جو کر",
        "fa": "در به از که این را با است برای آن یک خود تا کرد بر هم نیز می شود ما های شما من او اما هر باید",
    },
    "devanagari": {
        "hi": "है में के की का और से को ने पर यह हैं वह कि एक था भी नहीं हो इस लिए हम आप तो जो कर साथ गया",
        "mr": "आहे आणि च्या या मध्ये ते तो ती हे की नाही होते आहेत साठी एक पण तर मी आपण त्या केले असे वर करून होता",
        "ne": "छ र को मा का लागि यो हो पनि ले छन् गर्न भने हुन्छ तर एक हामी म तपाईं छैन गर्ने थियो यस भएको त्यो",
    },
}
"""The commonest words of languages that share a script."""
MARKS = {"ru": "ыэё", "uk": "іїєґ", "ur": "ٹڈڑےں", "es": "ñ¿¡", "pt": "ãõ", "pl": "ąęłńśźż", "de": "ß", "vi": "ăđơư"}
"""Letters that only one of them has."""
LANGUAGES = frozenset({*ALONE, *(code for listed in COMMON.values() for code in listed)})

_WORDS = {code: frozenset(text.split()) for listed in COMMON.values() for code, text in listed.items()}
_LETTERS = re.compile("|".join(f"(?P<{name}>[{letters}])" for name, letters in SCRIPTS.items()))
_RUN = re.compile(r"[^\W\d_]+(?:[\u0900-\u0963\u064b-\u0652\u200c]+[^\W\d_]*)*")


def is_in(text: str, code: str) -> bool:
    """Whether a text is mostly in a language of LANGUAGES. A text without letters is in none."""
    script = main_script(text)
    if code in ALONE:
        return script == ALONE[code]
    if script is None or code not in COMMON.get(script, {}):
        return False
    counts, letters = Counter(_RUN.findall(text.lower())), Counter(text.lower())
    scores = {
        other: sum(counts[word] for word in _WORDS[other]) + sum(letters[mark] for mark in MARKS.get(other, ""))
        for other in COMMON[script]
    }
    return scores[code] > 0 and scores[code] == max(scores.values())


def main_script(text: str) -> str | None:
    """The script that most letters of a text are in. Japanese is known by its kana, however much of it is Chinese."""
    counts = Counter(match.lastgroup for match in _LETTERS.finditer(text))
    if counts["kana"] and counts["kana"] * 10 >= counts["han"]:
        counts["kana"] += counts.pop("han", 0)
    return max(counts, key=lambda script: counts[script]) if counts else None
