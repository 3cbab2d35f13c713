"""Whether hints are there and can be used: not empty, doubled, contradictory, too long or in another language."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from dopd.data.views import is_blank
from dopd.hints import phrases
from dopd.hints.answers import Answer, boxed, read_answer
from dopd.hints.choice_leaks import option_kinds, truth_kinds
from dopd.hints.leaks import Hint
from dopd.hints.number_leaks import Numbers, equations
from dopd.hints.text import clause_after, clause_before, folded, plain, words

FAULTS = {
    "empty": "no hint: both privileged views read the plain prompt",
    "duplicated": "the words of another problem's hint",
    "contradictory": "another answer than the row's, or a sum that is wrong",
    "over_long": "longer than asked for",
    "language": "another language than the question's",
    "boxes": "boxes that are none, or outside their image",
}
_NOTHING = frozenset(("n/a", "na", "none", "null", "nan", "todo", "tbd", "no hint", "hint", "-", "..."))
_ANSWER_IS = re.compile(r"\banswer\b", re.I)
_STOP_WORDS = {
    "en": "the of and to is in that it for with you are this how then from find by what your has have does many each",
    "de": "der die das und ist nicht mit von ein eine zu den wie dann auf aus finde zuerst berechne wird sind",
    "fr": "le la les et est une des pour dans que qui avec puis sur du au trouver combien sont calcule d'abord",
    "es": "el los las y es una por para con que del luego se primero cuantos encuentra como entonces calcula son",
    "it": "il lo gli e di che una per con del poi si primo quanti trova come sono della calcola prima",
    "pt": "o os as e um uma para com que do da depois se primeiro quantos encontre como sao calcule por",
    "nl": "de het een en van is niet met dan op hoe eerst vind bereken hoeveel zijn voor wordt dat uit",
}
_LANGUAGES = {name: frozenset(own.split()) for name, own in _STOP_WORDS.items()}
_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC", "GREEK", "HEBREW", "THAI", "DEVANAGARI")


@dataclass
class Coverage:
    """Rows by what is wrong with their hints.

    Attributes:
        num_rows (`int`): all rows.
        num_hints (`int`): those with a hint.
        rows (`dict[str, list[int]]`): numbers of rows by the names of `FAULTS`, in order.
        about (`dict[int, str]`): of a row, what was found first, in words.
    """

    num_rows: int = 0
    num_hints: int = 0
    rows: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in FAULTS})
    about: dict[int, str] = field(default_factory=dict)

    def add(self, row: int, fault: str, about: str = "") -> None:
        self.rows[fault].append(row)
        self.about.setdefault(row, about or FAULTS[fault])

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.num_rows, "with_hint": self.num_hints, **self.rows}


def is_empty(text: str | None) -> bool:
    """Whether a hint says nothing: blank, signs alone, or a word such as `n/a` in its place."""
    if text is None or is_blank(text):
        return True
    return text.strip().casefold() in _NOTHING or not any(one.isalnum() for one in text)


def duplicates(hints: Iterable[tuple[int, Hint]]) -> list[int]:
    """Rows whose hint is that of a row with another question."""
    groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for row, hint in hints:
        groups[" ".join(words(hint.text)) or hint.text].append((row, " ".join(words(hint.question)) or hint.question))
    doubled = [group for group in groups.values() if len({question for _, question in group}) > 1]
    return sorted(row for group in doubled for row, _ in group)


def contradiction(hint: Hint) -> str | None:
    """What a hint says against its row, or against arithmetic; `None` for nothing."""
    text, question = plain(hint.text), plain(hint.question)
    numbers = Numbers(text, question)
    if "mod" not in words(text):
        wrong = next((quoted for quoted, _, right, _ in equations(numbers) if not right and "?" not in quoted), None)
        if wrong is not None:
            return f"{wrong.strip()} is wrong"
    if hint.answer is None:
        return None
    answer = read_answer(hint.answer, question)
    other = _other_answer(text, numbers, answer)
    return None if other is None else f"it names {other} as the answer, and the row has {answer.text}"


def _other_answer(text: str, numbers: Numbers, answer: Answer) -> str | None:
    if answer.truth is not None:
        opposite = truth_kinds(text, not answer.truth)
        return None if not opposite or truth_kinds(text, answer.truth) else opposite["yes_no"]
    if answer.letter:
        if option_kinds(text, answer):
            return None
        others = [letter for letter in answer.options if letter != answer.letter]
        theirs = [letter for letter in others if option_kinds(text, replace(answer, letter=letter))]
        return theirs[0] if len(theirs) == 1 else None
    if not answer.values:
        return None
    named = [
        one for one in numbers.mentioned if _is_named(text, numbers, one.start, one.end) and not numbers.is_part(one)
    ]
    if not named or any(one.values & answer.values for one in numbers.mentioned):
        return None
    return text[named[-1].start : named[-1].end]


def _is_named(text: str, numbers: Numbers, start: int, end: int) -> bool:
    before, after = clause_before(text, start), clause_after(text, end)
    if phrases.NEGATED.search(before) or phrases.OPERAND_AFTER.search(after) or after[:1] == "-":
        return False
    in_box = any(text[start:end] == plain(one) for one in boxed(text))
    return in_box or bool(_ANSWER_IS.search(before) and phrases.NAMED.search(before))


def num_words(text: str) -> int:
    """Words of a text; signs of scripts without spaces count as one each."""
    return sum(max(1, sum(_script(sign) in ("CJK", "HIRAGANA", "KATAKANA") for sign in word)) for word in words(text))


def language_of(text: str) -> str | None:
    """The language of a text, or its script where that is not Latin; `None` where that is not sure."""
    letters = [one for one in text if one.isalpha()]
    scripts = [_script(one) for one in letters]
    for script in _SCRIPTS:
        if letters and scripts.count(script) >= 0.4 * len(letters):
            return "CJK" if script in ("HIRAGANA", "KATAKANA") else script
    own = words(text)
    hits = sorted(((sum(word in stop for word in own), name) for name, stop in _LANGUAGES.items()), reverse=True)
    (most, name), (second, _) = hits[:2]
    return name if most >= 3 and most >= 2 * second else None


def _script(sign: str) -> str:
    return unicodedata.name(sign, "").partition(" ")[0] if not sign.isascii() else "LATIN"


def is_other_language(hint: str, question: str) -> bool:
    """Whether hint and question are surely in different languages."""
    mine, theirs = language_of(folded(hint)), language_of(folded(question))
    return mine is not None and theirs is not None and mine != theirs
