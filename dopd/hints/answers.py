"""What a hint must not give away: the answer of a row as a number, a letter of an option, a truth value, or text."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from dopd.hints.numbers import Mention, mentions
from dopd.hints.text import plain, squeezed, words

_FINAL = re.compile(r"^\s*####\s*(.+?)\s*$", re.M)
_SAID = re.compile(r"\b(?:final |correct )?answer\s*(?:is|:|=)\s*(.+?)(?:[.!]?\s*$|[.!]\s)", re.I | re.M)
_LETTER = re.compile(
    r"(?:the\s+)?(?:option|choice|answer)?\s*[(\[]?([A-J])[)\].:]*(?:\s*[).:\-]\s*(?P<text>\S.*))?", re.I | re.S
)
_OPTION = re.compile(r"(?:^|(?<=[\s,;]))[(\[]?([A-J])[).\]:]\s*(.+?)(?=[,;]?\s+[(\[]?[A-J][).\]:]\s|\s*$)", re.S)
_TRUTHS = {
    **dict.fromkeys(("yes", "true", "correct", "right"), True),
    **dict.fromkeys(("no", "false", "incorrect", "wrong"), False),
}
_YES_NO_WORDS = {
    True: ["yes", "affirmative", "positive", "ja", "oui", "si", "sim", "da", "\u662f", "\u5bf9", "\u0434\u0430"],
    False: ["no", "negative", "nein", "non", "nao", "nee", "\u5426", "\u4e0d", "\u043d\u0435\u0442"],
}

# Unit -> (kind of quantity, how many of the kind's first unit).
_UNITS: dict[str, dict[str, str | int]] = {
        "length": {
            "mm millimeters millimetres millimeter": "1/1000", "cm centimeters centimetres centimeter": "1/100",
            "m meters metres meter metre": 1, "km kilometers kilometres kilometer": 1000,
            "inches inch": "254/10000", "ft feet foot": "3048/10000", "yd yards yard": "9144/10000",
            "mi miles mile": "1609344/1000",
        },
        "mass": {"mg milligrams": "1/1000", "g grams gram": 1, "kg kilograms kilogram kilos": 1000,
                 "tonnes tonne": 10**6},
        "time": {"ms milliseconds": "1/1000", "s sec secs seconds second": 1, "min mins minutes minute": 60,
                 "h hr hrs hours hour": 3600, "days day": 86400, "weeks week": 604800},
        "volume": {"ml milliliters millilitres": "1/1000", "cl": "1/100", "l liters litres liter litre": 1},
        "money": {"cents cent": "1/100", "dollars dollar bucks usd": 1},
        "count": {"pairs pair": 2, "dozens": 12},
    }  # fmt: skip
UNITS: dict[str, tuple[str, Fraction]] = {
    name: (kind, Fraction(factor))
    for kind, several in _UNITS.items()
    for names, factor in several.items()
    for name in names.split()
}


@dataclass(frozen=True)
class Answer:
    """The answer of a row, in the ways in which a hint may give it away.

    Attributes:
        text (`str`): as it stands.
        values (`frozenset[Fraction]`): what it may mean as a number; empty if it is none.
        places (`int`): digits behind the point of that number.
        unit (`str`): behind that number, lower case.
        letter (`str`): of the right option, upper case.
        options (`dict[str, str]`): the question's options, by letter.
        truth (`bool`, *optional*): of an answer that is yes or no.
        words (`tuple[str]`): of an answer that is text.
        formula (`str`): of an answer that is neither one number nor words.
    """

    text: str
    values: frozenset[Fraction] = frozenset()
    places: int = 0
    unit: str = ""
    letter: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    truth: bool | None = None
    words: tuple[str, ...] = ()
    formula: str = ""


def answer_text(row: Mapping[str, Any]) -> str | None:
    """The answer that a row names, or the one that its solution ends with; `None` where there is none."""
    value = row.get("answer")
    if isinstance(value, Mapping):
        value = value.get("ground_truth", value.get("value", value.get("answer")))
    if isinstance(value, list | tuple) and value:
        value = value[0] if len(value) == 1 else json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str) and value.strip():
        return final_part(value)
    solution = row.get("solution")
    return concluded(solution) if isinstance(solution, str) else None


def final_part(text: str) -> str:
    """What a text names as its result, or the text itself."""
    return concluded(text) or text.strip()


def concluded(solution: str) -> str | None:
    """The result that a solution marks: behind `####`, in a box, or behind "the answer is"."""
    if found := _FINAL.findall(solution):
        return found[-1]
    if boxes := boxed(solution):
        return boxes[-1]
    found = _SAID.findall(solution)
    return found[-1].strip() if found else None


def boxed(text: str) -> list[str]:
    """What stands in boxes of LaTeX."""
    found = []
    for start in re.finditer(r"\\f?boxed\s*\{", text):
        depth, end = 1, start.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth:
            found.append(text[start.end() : end - 1].strip())
    return found


def options_of(question: str) -> dict[str, str]:
    """The options of a question, by letter: two or more, from A on."""
    found = [(letter, text.strip(" \n,;")) for letter, text in _OPTION.findall(question)]
    start = next((n for n, (letter, _) in enumerate(found) if letter == "A"), len(found))
    options = {}
    for n, (letter, text) in enumerate(found[start:]):
        if letter != chr(ord("A") + n):
            break
        options[letter] = text
    return options if len(options) > 1 else {}


def read_answer(text: str, question: str = "") -> Answer:
    """The answer of a row, read beside its (`plain`) question."""
    text = plain(text).strip()
    text = text.strip("$").strip() if text.count("$") % 2 == 0 else text
    text = (boxed(text) or [text])[-1]
    text = re.sub(r"^(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is|:)\s*", "", text, flags=re.I)
    options = options_of(question)
    lowered = text.strip(" .!()").casefold()
    if lowered in _TRUTHS and lowered not in {option.casefold() for option in options.values()}:
        return Answer(text, truth=_TRUTHS[lowered])
    found = _LETTER.fullmatch(text.strip())
    is_letter = (
        found and (found[1].isupper() or options) and (options or len(text.strip(" ().[]:")) == 1 or found["text"])
    )
    if found and is_letter and (not options or found[1].upper() in options):
        letter = found[1].upper()
        content = options.get(letter) or found["text"] or ""
        return _of_content(content.strip(), Answer(content.strip() or text, letter=letter, options=options))
    letter = next((key for key, option in options.items() if words(option) and words(option) == words(text)), "")
    return _of_content(text, Answer(text, letter=letter, options=options))


def _of_content(text: str, base: Answer) -> Answer:
    """The same answer with what its text says."""
    if not text:
        return base
    number = _lone_number(text)
    if number is not None:
        rest = text[number.end :].strip(" .$)")
        unit = (re.match(r"[A-Za-z/^0-9]+", rest) or [""])[0].casefold()
        unit = unit or ("dollars" if "$" in text[: number.start + 1] else "")
        values = frozenset(number.values)
        return Answer(text, values, number.places, unit, base.letter, base.options)
    letters = words(text)
    if re.search(r"[\\^=+*/()\[\]{}<>|,]|\d", text) and not _is_prose(text):
        return Answer(
            text,
            letter=base.letter,
            options=base.options,
            words=tuple(letters),
            formula=squeezed(text),
        )
    return Answer(text, letter=base.letter, options=base.options, words=tuple(letters))


def _is_prose(text: str) -> bool:
    long_words = [
        word for word in re.findall(r"[^\W\d_]{3,}", text) if word not in ("sqrt", "sin", "cos", "log", "frac")
    ]
    return "\\" not in text and len(long_words) >= 1 and not re.search(r"[=^<>]", text)


def _lone_number(text: str) -> Mention | None:
    """The number of an answer that is one number, with or without a name of what is counted."""
    found = [one for one in mentions(text) if one.start >= 0]
    outer = [one for one in found if not any(_within(one, other) for other in found)]
    if len(outer) != 1:
        return None
    before, behind = text[: outer[0].start].strip(" $(~=").casefold(), text[outer[0].end :]
    named = re.fullmatch(r"(?:[a-z]\s*=?|[a-z_]+\s*=|about|exactly|usd|rs\.?|[^\w\s]*)?\s*", before)
    counted = re.fullmatch(r"\s*[^\d=+*/^()\\,;]{0,40}(?:/\s*[a-z]+|\^[23])?\s*[.)]*", behind, re.I)
    return outer[0] if named and counted and len(behind.split()) <= 4 else None


def _within(one: Mention, other: Mention) -> bool:
    return one is not other and other.start <= one.start and one.end <= other.end and (
        (other.end - other.start) > (one.end - one.start)
    )  # fmt: skip


def amounts(text: str) -> list[tuple[str, Fraction, str]]:
    """Quantities with units in a text, those that stand side by side (2 hours and 30 minutes) added up: what kind of
    quantity, how many of the kind's first unit, and the words.
    """
    found: list[tuple[str, Fraction, int, int]] = []
    for one in mentions(text):
        unit = re.match(r"\s*-?([a-zA-Z]+)", text[one.end :])
        if one.operands or unit is None or unit[1].casefold() not in UNITS:
            continue
        kind, factor = UNITS[unit[1].casefold()]
        value, start, end = min(one.values) * factor, one.start, one.end + unit.end()
        if found and found[-1][0] == kind and re.fullmatch(r"\s*(?:,|and)?\s*", text[found[-1][3] : start]):
            value, start = value + found[-1][1], found.pop()[2]
        found.append((kind, value, start, end))
    return [(kind, value, text[start:end]) for kind, value, start, end in found]


def yes_no_words(truth: bool) -> Sequence[str]:
    """How people say yes or no."""
    return _YES_NO_WORDS[truth]
