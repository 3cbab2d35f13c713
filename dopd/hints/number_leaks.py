"""Numbers in a hint that give the answer away, or the result of a step."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from dopd.hints import phrases
from dopd.hints.answers import UNITS, Answer
from dopd.hints.numbers import Mention, mentions
from dopd.hints.text import clause_after, clause_before, words

_SMALL = 12
# Numbers that plans use without anybody having worked them out: of clocks, angles, percentages, money, nature.
_WRITTEN = (
    "15 16 20 24 25 26 28 29 30 31 32 36 40 45 50 52 60 64 75 80 90 99 100 128 144 180 256 270 360 365 366 500"
    " 1000 1024 "
    "3600 10000 1000000 0.1 0.25 0.5 0.75 0.2 1.5 2.5 3.14 3.14159 3.1416 22/7 9.8 9.81 273 273.15 1/2 1/3 2/3"
    " 1/4 3/4 2.54"
)
_CONSTANTS = frozenset(map(Fraction, _WRITTEN.split()))
# Of these, those that a sum may have beside the question's own numbers.
_FACTORS = frozenset(map(Fraction, (1, 2, 3, 4, 7, 10, 12, 24, 60, 100, 180, 360, 365, 1000)))
# Numbers of clocks, calendars, angles and shares: of these alone an answer may stand in a plan by chance.
_EVERYDAY = frozenset(
    map(Fraction, ("24", "25", "50", "52", "60", "75", "90", "100", "180", "360", "365", "1000", "1/2", "1/4"))
)
_COUNTED = re.compile(
    r"\bhow (?:many|much)\s+(?:more |fewer |less |total |other |different |whole |full )*([a-z]+)", re.I
)
_COMMON_WORDS = frozenset(
    [
        "the",
        "of",
        "to",
        "by",
        "and",
        "then",
        "with",
        "find",
        "use",
        "from",
        "in",
        "is",
        "are",
        "it",
        "you",
        "for",
        "each",
        "that",
        "first",
    ]
)
_NEAR = re.compile(
    r"\b(?:about|roughly|approximately|around|nearly|almost|close to|just (?:over|under)|a bit (?:over"
    r"|under))\s*\$?$",
    re.I,
)
_EQUATION = re.compile(
    r"\s*,?\s*(?:=|equals|is equal to|is|are|gives?(?: you| us)?|makes|yields|comes? to|to get|which is|we get"
    r"|you get|, giving|, so)\s*[$(]?\s*",
    re.I,
)
_PREFIX_SUM = re.compile(
    r"\b(?:sum|product|difference|quotient|adding|add|multiply|multiplying|subtract|subtracting|dividing|divide"
    r"|combining|doubling)\b",
    re.I,
)


@dataclass(frozen=True)
class Numbers:
    """A hint beside its question, with the numbers of both.

    Attributes:
        hint, question (`str`): as `plain` gives them.
    """

    hint: str
    question: str

    @cached_property
    def mentioned(self) -> list[Mention]:
        """Numbers of the hint that count no step."""
        masked = without_enumerators(self.hint)
        return mentions(masked)

    @cached_property
    def asked(self) -> frozenset[Fraction]:
        """Numbers of the question."""
        return frozenset(value for one in mentions(self.question) if not _is_sum(one) for value in one.values)

    @cached_property
    def is_prose(self) -> bool:
        """Whether the hint is written in sentences."""
        own = words(self.hint)
        return len(own) >= 5 and (bool(_COMMON_WORDS & set(own)) or not self.hint.isascii())

    @cached_property
    def counted(self) -> frozenset[str]:
        """What the question asks the number of."""
        return frozenset(noun.lower().rstrip("s") for noun in _COUNTED.findall(self.question))

    @cached_property
    def asked_units(self) -> dict[str, str]:
        """Units of the question, one of each kind of quantity; none of a kind of which it has several."""
        named = ["dollars"] if "$" in self.question else []
        named += [word for word in words(self.question) if word in UNITS and len(word) > 1]
        kinds: dict[str, set[Fraction]] = {}
        for unit in named:
            kinds.setdefault(UNITS[unit][0], set()).add(UNITS[unit][1])
        return {UNITS[unit][0]: unit for unit in named if len(kinds[UNITS[unit][0]]) == 1}

    def is_new(self, one: Mention) -> bool:
        """Whether a number is none of the question's."""
        return not one.values & self.asked

    def is_part(self, one: Mention) -> bool:
        """Whether a number stands in a sum."""
        return any(
            two.operands and two.start <= one.start and one.end <= two.end for two in self.mentioned if two is not one
        )

    def text(self, one: Mention) -> str:
        return self.hint[one.start : one.end]

    def before(self, one: Mention) -> str:
        return clause_before(self.hint, one.start)

    def after(self, one: Mention) -> str:
        return clause_after(self.hint, one.end)

    def is_restated(self, one: Mention) -> bool:
        """Whether the question has the same words before the number."""
        near = words(self.before(one))[-2:]
        own = " ".join([*near, *words(self.text(one))])
        return len(near) == 2 and f" {own} " in f" {' '.join(words(self.question))} "


def without_enumerators(text: str) -> str:
    """The text with spaces in place of the numbers of steps and lists, and of boxes in pictures."""
    for pattern in (phrases.ENUMERATOR, phrases.BOX):
        text = pattern.sub(lambda found: " " * len(found.group()), text)
    found = list(phrases.LISTED.finditer(text))
    count = 0
    for one in found:
        if int(one[1]) in (count + 1, 0) and (len(found) > 1 or int(one[1]) == 1):
            count = int(one[1])
            text = text[: one.start()] + " " * len(one.group()) + text[one.end() :]
    return text


def number_kinds(numbers: Numbers, answer: Answer) -> dict[str, str]:
    """How numbers of the hint give a number away that is the answer: the evidence by the kind of leak."""
    found: dict[str, str] = {}
    for one in numbers.mentioned:
        how = _same(one, answer, numbers)
        if how is None or not _is_given_away(one, numbers, answer):
            continue
        shown = numbers.text(one)
        exact = not one.operands and shown.replace(",", "").strip() in answer.text.replace(",", "")
        for kind in ("number", "verbatim" if exact else "equivalent", *(["unit"] if how == "unit" else [])):
            found.setdefault(kind, shown)
    return found


def _same(one: Mention, answer: Answer, numbers: Numbers) -> str | None:
    """Whether a mention means the answer: as a number, after rounding, or in another unit."""
    unit = (re.match(r"\s*[-]?([a-zA-Z]+)", numbers.hint[one.end :]) or ["", ""])[1].casefold()
    unit = unit if unit in UNITS else ("dollars" if numbers.hint[: one.start].rstrip().endswith("$") else "")
    theirs = UNITS.get(unit)
    own = answer.unit if answer.unit in UNITS or theirs is None else numbers.asked_units.get(theirs[0], "")
    mine = UNITS.get(own)
    if mine and theirs and mine != theirs:
        if mine[0] != theirs[0]:
            return None
        same = any(a * mine[1] == b * theirs[1] for a in answer.values for b in one.values)
        return "unit" if same else None
    if one.values & answer.values:
        return "unit" if unit and unit == answer.unit else "number"
    for a in answer.values:
        for b in one.values:
            digits = min(answer.places, one.places)
            if digits and answer.places != one.places and round(a, digits) == round(b, digits) and abs(a) >= 1:
                return "number"
            if _NEAR.search(numbers.before(one)) and a and abs(a - b) <= abs(a) / 50 and abs(a) > _SMALL:
                return "number"
    return None


def _is_given_away(one: Mention, numbers: Numbers, answer: Answer) -> bool:
    before, after = numbers.before(one), numbers.after(one)
    if phrases.NEGATED.search(before) or re.match(r"-[a-z]{3,}", after):  # a two-digit number
        return False
    if not numbers.is_new(one) and numbers.is_part(one):
        return False
    asked = numbers.hint[one.end : one.end + 3].strip().startswith("?")
    if (phrases.NAMED.search(before) or phrases.IS_ANSWER.search(after)) and not asked:
        return True
    if _is_sum(one):
        operands = set(one.operands)
        if _squeezed(numbers.text(one)) in _squeezed(numbers.question):
            return False
        alone = len(words(numbers.hint)) <= 3 or phrases.CONCLUDED.search(before)
        return not operands <= (numbers.asked if alone else numbers.asked | _FACTORS)
    if len(words(numbers.hint)) <= 3 and not phrases.OPERAND_AFTER.search(after):
        return True
    concluded = bool(phrases.CONCLUDED.search(before) or phrases.LEFT_OVER.search(after))
    equals = bool(phrases.EQUALS.search(before)) and not phrases.GIVEN.search(_own_side(before))
    if not numbers.is_new(one):
        concluded = concluded or bool(answer.letter and phrases.COPULA.search(before))
        return (concluded or equals) and not numbers.is_restated(one)
    if one.ordinal and not concluded:
        return False
    if not _is_ordinary(one) or not any(value <= _SMALL or value in _EVERYDAY for value in one.values):
        return True
    followed = phrases.OPERAND_AFTER.search(after)
    if concluded or equals or not (numbers.is_prose or followed):
        return True
    used = phrases.OPERAND_BEFORE.search(before) or followed
    if phrases.COPULA.search(before) and not phrases.GIVEN.search(before) and not used:
        return True
    noun = (re.match(r"\s+([a-z]+)", after, re.I) or ["", ""])[1].lower().rstrip("s")
    if noun and noun in numbers.counted and not one.in_words:
        return True
    return not used and (answer.unit != "" and noun == answer.unit.rstrip("s"))


def _own_side(before: str) -> str:
    """The clause of an equation, without what stands before its comma."""
    return re.split(r",\s", before)[-1]


def _is_sum(one: Mention) -> bool:
    return bool(one.operands)


def _is_ordinary(one: Mention) -> bool:
    """Whether every plan may have such a number by chance."""
    return all(abs(v) in _CONSTANTS or (v.denominator == 1 and abs(v) <= _SMALL) for v in one.values) or (
        bool(one.values & _CONSTANTS) and len(one.values) > 1
    )


def _squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def results(numbers: Numbers, solution: str, answer: Answer | None) -> list[str]:
    """Results of steps that a hint carries out: equations that it works out, and results of its solution.

    Args:
        numbers (`Numbers`): the hint.
        solution (`str`): as `plain` gives it, or `""`.
        answer (`Answer`, *optional*): which is told apart.
    """
    worked = Numbers(solution, "")
    theirs = frozenset(
        value
        for one in worked.mentioned
        if phrases.EQUALS.search(worked.before(one)) and not worked.is_part(one)
        for value in one.values
    )
    final = answer.values if answer is not None else frozenset()
    found = [
        text
        for text, value, right, operands in equations(numbers)
        if right
        and value not in numbers.asked
        and (value in theirs or not numbers.asked or numbers.asked & set(operands))
    ]
    for one in numbers.mentioned:
        written_out = _is_sum(one) or "/" in numbers.text(one) or numbers.is_part(one)
        if written_out or one.ordinal or not numbers.is_new(one) or one.values & final:
            continue
        before, after = numbers.before(one), numbers.after(one)
        if phrases.NEGATED.search(before):
            continue
        mentioned = bool(
            phrases.CONCLUDED.search(before)
            or (phrases.EQUALS.search(before) and not phrases.GIVEN.search(_own_side(before)))
            or phrases.LEFT_OVER.search(after)
        )
        of_solution = bool(one.values & theirs)
        if _is_ordinary(one):
            large = all(value > _SMALL or value.denominator > 1 for value in one.values)
            if of_solution and (mentioned or large or not numbers.is_prose or phrases.COPULA.search(before)):
                found.append(numbers.text(one))
        elif of_solution or mentioned:
            found.append(numbers.text(one))
    return found


def equations(numbers: Numbers) -> list[tuple[str, Fraction, bool, tuple[Fraction, ...]]]:
    """Sums with a result behind them: the text, the result, whether it is right, and the numbers of the sum."""
    singles = [one for one in numbers.mentioned if not _is_sum(one)]
    found: list[tuple[str, Fraction, bool, tuple[Fraction, ...]]] = []
    for one in numbers.mentioned:
        if not _is_sum(one):
            continue
        link = _EQUATION.match(numbers.hint, one.end)
        behind = next((two for two in singles if link and two.start == link.end()), None)
        if behind is None or phrases.NEGATED.search(numbers.before(one)):
            continue
        value, named = min(behind.values), min(one.values)
        longer = any(two.start == behind.start and two.end > behind.end for two in numbers.mentioned)
        if longer:  # 3 * 4 = 2 * 6
            continue
        digits = behind.places
        right = value == named or (digits > 0 and round(named, digits) == value) or named in behind.values
        found.append((numbers.hint[one.start : behind.end], value, right, one.operands))
    return [*found, *_in_words(numbers, singles)]


def _in_words(numbers: Numbers, singles: Sequence[Mention]) -> list[tuple[str, Fraction, bool, tuple[Fraction, ...]]]:
    """`the sum of 3 and 4 is 7`: three numbers of one sentence of which the last is worked out of the others."""
    found: list[tuple[str, Fraction, bool, tuple[Fraction, ...]]] = []
    for first, second, third in zip(singles, singles[1:], singles[2:], strict=False):
        between = numbers.hint[first.end : second.start], numbers.hint[second.end : third.start]
        if not re.fullmatch(r"(?:\s+[\w$]+){0,2}\s+(?:and|by|from|to|with)\s+(?:the\s+)?\$?", between[0], re.I):
            continue
        if not _PREFIX_SUM.search(numbers.before(first)) or len(between[1]) > 40:
            continue
        if not re.search(r"\b(?:is|gives?|get|yields?|makes?|equals?|to|becomes)\b|=", between[1]):
            continue
        a, b, c = min(first.values), min(second.values), min(third.values)
        if c in (a + b, a * b, abs(a - b)) or (b and c == a / b) or (a and c == b / a):
            found.append((numbers.hint[first.start : third.end], c, True, (a, b)))
    return found
