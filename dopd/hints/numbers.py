"""Numbers that a text mentions: in digits, in words, as fractions and percentages, and as sums to work out."""

import ast
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

_ONES = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_VALUES = {word: n for n, word in enumerate(_ONES)} | {word: 20 + 10 * n for n, word in enumerate(_TENS)}
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4,
    "fifth": 5, "fifths": 5, "sixth": 6, "sixths": 6, "seventh": 7, "sevenths": 7, "eighth": 8, "eighths": 8,
    "ninth": 9, "ninths": 9, "tenth": 10, "tenths": 10,
}  # fmt: skip
_NAME = "|".join(sorted([*_VALUES, *_SCALES, "dozen"], key=len, reverse=True))
_PART = "|".join(sorted(_PARTS, key=len, reverse=True))
_RATIO = re.compile(r"\s*(?:out of(?: every| the)?|of (?:the|every|all)|in every)\s*", re.I)
_AND_A_PART = re.compile(r"\s+and\s+(?:a|one)\s+(half|quarter|third)\b", re.I)
_IN_WORDS = re.compile(
    rf"\b(?:(?:a|an)\s+(?=hundred|thousand|million|dozen|half|third|quarter))?"
    rf"(?:{_NAME})(?:(?:\s*-\s*|\s+and\s+|\s+)(?:{_NAME}))*(?:\s+point(?:\s+(?:{'|'.join(_ONES[:10])}))+)?\b",
    re.I,
)
_PART_IN_WORDS = re.compile(
    rf"\b(?:(?P<top>{'|'.join(_ONES[1:13])}|an?)[\s-]+)?(?P<part>{_PART})\b",
    re.I,
)
_DIGITS = re.compile(
    r"(?<![A-Za-z0-9_.])(?P<sign>[-+](?=[\d.]))?"
    r"(?P<body>\d{1,3}(?:[,'\u00a0\u202f ]\d{3})+(?!\d)(?:\.\d+)?|\d{1,3}(?:\.\d{3})+,\d+|\d+(?:\.\d+)?|\.\d+)"
    r"(?P<power>\s*\*\s*10\s*\^\s*-?\d{1,2}|[eE][-+]?\d{1,2}(?!\w))?"
    r"(?P<below>\s*/\s*\d+(?:\.\d+)?(?![\d/]))?"
    r"(?P<scale>\s*(?:hundred|thousand|million|billion|dozen)\b|[kK](?!\w))?"
    r"(?P<percent>\s*(?:%|percent\b|per cent\b|pct\b))?"
    r"(?P<ordinal>(?:st|nd|rd|th)\b)?"
)
# What a minus takes away from, where it does not make negative.
_BEHIND_TERM = re.compile(r"[\w)\]}]$|[\d)\]}]\s+$")
_MINUS = re.compile(rf"(?:\b(?P<from>[\d)]+|{_NAME})\s+)?\b(?P<word>minus|negative)\s+$", re.I)
_OPERATORS_IN_WORDS = (
    (re.compile(r"\s+(?:times|multiplied by)\s+", re.I), "*"),
    (re.compile(r"\s+(?:divided by|over)\s+", re.I), "/"),
    (re.compile(r"\s+(?:plus|added to)\s+", re.I), "+"),
    (re.compile(r"\s+(?:minus|less)\s+", re.I), "-"),
    (re.compile(r"\s+(?:to the power of)\s+", re.I), "^"),
)
_OPERATOR = (
    r"(?:\s*[-+*/^]\s*|\s+(?:times|multiplied by|divided by|over|plus|added to|minus|less|to the power of|x)\s+)"
)
_MOST = 10**15
# A number that is told by another one.
_DESCRIBED: tuple[tuple[str, Callable[[Fraction], Fraction]], ...] = (
    (r"\b(?:double|twice|two times)\s+(?:of\s+)?$", lambda one: 2 * one),
    (r"\b(?:triple|thrice)\s+$", lambda one: 3 * one),
    (r"\bhalf\s+(?:of\s+)?(?:the\s+)?$", lambda one: one / 2),
    (
        r"\b(?:one|1) (?:more|greater|higher|larger) than\s+$|\bsuccessor of\s+$|\bnumber (?:right )?(?:after"
        r"|behind)\s+$",
        lambda one: one + 1,
    ),
    (r"\b(?:one|1) (?:less|fewer|smaller|lower) than\s+$|\bnumber (?:right )?before\s+$", lambda one: one - 1),
    (r"\b(?:the )?square of\s+$", lambda one: one * one),
)


@dataclass(frozen=True)
class Mention:
    """A number in a text.

    Attributes:
        start, end (`int`): its place.
        values (`frozenset[Fraction]`): what it may mean: 50% is 50 and 1/2, "1.234" also 1234.
        operands (`tuple[Fraction]`): of a sum that can be worked out; empty for a number.
        places (`int`): digits behind the point.
        ordinal (`bool`): one in a series, such as 3rd.
        in_words (`bool`): whether it is written in letters.
    """

    start: int
    end: int
    values: frozenset[Fraction]
    operands: tuple[Fraction, ...] = ()
    places: int = 0
    ordinal: bool = False
    in_words: bool = False


def mentions(text: str) -> list[Mention]:
    """The numbers of a text (as `dopd.hints.text.plain` gives it), in order, sums beside the numbers in them."""
    singles = sorted([*_in_digits(text), *_in_words(text)], key=lambda one: (one.start, -one.end))
    return sorted([*singles, *_sums(text, singles), *_described(text, singles)], key=lambda one: (one.start, one.end))


def _in_digits(text: str) -> Iterator[Mention]:
    for found in _DIGITS.finditer(text):
        body, start = found["body"], found.start()
        sign = found["sign"] or ""
        if sign and _BEHIND_TERM.search(text[max(0, start - 8) : start]):
            sign, start = "", start + 1
        readings = _readings(body)
        if found["power"]:
            exponent = int(re.findall(r"-?\d+", found["power"])[-1])
            readings = {value * Fraction(10) ** exponent for value in readings}
        operands: tuple[Fraction, ...] = ()
        if found["below"]:
            below = Fraction(found["below"].strip().lstrip("/").strip())
            if not below:
                continue
            top = next(iter(readings))
            quotient = {value / below for value in readings}
            # A fraction that is a whole number is something to work out.
            operands = (top, below) if all(value.denominator == 1 for value in quotient) else ()
            whole = re.search(r"(?<![\d.])(\d{1,4})\s+$", text[max(0, start - 8) : start])
            if whole and top < below:  # 1 1/2
                quotient |= {Fraction(whole[1]) + value for value in quotient}
            readings = quotient
        if found["scale"]:
            scale = {"k": 1000, "dozen": 12, **_SCALES}[found["scale"].strip().lower()]
            readings = {value * scale for value in readings}
        if found["percent"]:
            readings |= {value / 100 for value in readings}
        if sign == "-" or _is_negative(text, start):
            readings = {-value for value in readings}
        places = len(body.partition(".")[2]) if "," not in body.partition(".")[2] else 0
        yield Mention(start, found.end(), frozenset(readings), operands, places, bool(found["ordinal"]))


def _is_negative(text: str, start: int) -> bool:
    """Whether a number is called negative by a word before it."""
    found = _MINUS.search(text[max(0, start - 30) : start])
    return found is not None and (found["word"].lower() == "negative" or found["from"] is None)


def _readings(body: str) -> set[Fraction]:
    """What digits may mean, with separators of thousands and both decimal signs."""
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+", body):
        return {Fraction(body.replace(".", "").replace(",", "."))}
    found = {Fraction(re.sub(r"[,'\s]", "", body))}
    if re.fullmatch(r"[1-9]\d{0,2}(?:\.\d{3})+", body):
        found.add(Fraction(body.replace(".", "")))
    return found


def _in_words(text: str) -> Iterator[Mention]:
    for found in _IN_WORDS.finditer(text):
        value = _worked_out(found.group()) or _year(found.group())
        if value is not None:
            value = Fraction(-value if _is_negative(text, found.start()) else value)
            if more := _AND_A_PART.match(text, found.end()):
                value += Fraction(1, _PARTS[more[1].lower()])
                yield Mention(found.start(), more.end(), frozenset({value}), in_words=True)
                continue
            percent = re.match(r"\s*(?:%|percent\b|per cent\b)", text[found.end() :], re.I)
            values = {value, value / 100} if percent else {value}
            yield Mention(found.start(), found.end(), frozenset(values), in_words=True)
    for found in _PART_IN_WORDS.finditer(text):
        top, part = (found["top"] or "").lower(), found["part"].lower()
        if not top and part not in ("half", "halves"):
            continue  # the third of them
        count = 1 if top in ("", "a", "an") else _VALUES[top]
        yield Mention(found.start(), found.end(), frozenset({Fraction(count, _PARTS[part])}), in_words=True)


def _year(text: str) -> Fraction | None:
    """A year in words: nineteen forty-five."""
    first, _, rest = text.lower().partition(" ")
    hundreds, years = _VALUES.get(first, 0), _worked_out(rest) if rest else None
    return (
        Fraction(100 * hundreds + years) if 10 <= hundreds <= 20 and years is not None and 10 <= years < 100 else None
    )


def _worked_out(text: str) -> Fraction | None:
    """The value of a number in English words."""
    whole, _, behind = text.lower().partition(" point ")
    total, current, last = 0, 0, 10**12
    for word in re.findall(r"[a-z]+", whole):
        if word in ("and", "a", "an"):
            continue
        if word in _VALUES:
            value = _VALUES[word]
            if current % 100 and not (current % 10 == 0 and value < 10):
                return None  # a list: two three
            current += value
        elif word == "dozen":
            current = (current or 1) * 12
        elif word == "hundred":
            current = (current or 1) * 100
        else:
            scale = _SCALES[word]
            if scale >= last:
                return None
            total, current, last = total + (current or 1) * scale, 0, scale
    digits = "".join(str(_VALUES[word]) for word in behind.split())
    return Fraction(total + current) + (Fraction(int(digits), 10 ** len(digits)) if digits else 0)


def _sums(text: str, singles: list[Mention]) -> Iterator[Mention]:
    """Numbers with operators between them, in signs or in words."""
    by_start = {one.start: one for one in singles if not one.ordinal and not one.operands}
    used = -1
    for begin in sorted(by_start):
        if begin < used:
            continue
        parts, operands, end = list[str](), list[Fraction](), begin
        at = begin
        while at in by_start or re.match(r"[(\s]+", text[at:]):
            opening = re.match(r"[(\s]*", text[at:])
            assert opening is not None
            inner = at + opening.end()
            if inner not in by_start:
                break
            one = by_start[inner]
            parts.append("(" * text[at:inner].count("(") + f"({_exact(one)})")
            operands.append(min(one.values))
            end = one.end
            closing = re.match(r"[)\s]*", text[end:])
            assert closing is not None
            closed = text[end : end + closing.end()].count(")")
            parts.append(")" * closed)
            behind = end + closing.end() if closed else end
            sign = re.match(_OPERATOR, text[behind:], re.I)
            if not sign:
                break
            parts.append(_sign(sign.group()))
            at = behind + sign.end()
        if len(operands) < 2:
            continue
        written = "".join(parts).rstrip("+-*/^")
        before = len(text[:begin]) - len(text[:begin].rstrip("( "))
        missing = max(0, written.count(")") - written.count("("))
        opened = text[begin - before : begin].count("(") if before else 0
        value = evaluated("(" * min(missing, opened) + written)
        used = end
        if value is not None:
            yield Mention(begin, end, frozenset({value}), tuple(operands))


def _described(text: str, singles: list[Mention]) -> Iterator[Mention]:
    for one in singles:
        for pattern, change in _DESCRIBED:
            found = re.search(pattern, text[max(0, one.start - 40) : one.start], re.I)
            if found and not one.ordinal:
                start = one.start - len(found.group())
                yield Mention(start, one.end, frozenset(map(change, one.values)), tuple(one.values))
    for one, two in pairwise(singles):
        low, high = min(one.values), min(two.values)
        colon = text[one.end : two.start] == ":" and two.end - two.start == 1  # and no time of day
        if (
            (colon or _RATIO.fullmatch(text[one.end : two.start]))
            and 0 < low < high
            and high.denominator == low.denominator == 1
        ):
            yield Mention(one.start, two.end, frozenset({low / high}))
        between = re.search(r"\bbetween\s+$", text[: one.start], re.I) and text[one.end : two.start].strip() == "and"
        if between and high - low == 2:
            yield Mention(one.start, two.end, frozenset({low + 1}), (low, high))


def _exact(one: Mention) -> str:
    value = min(one.values)
    return f"{value.numerator}/{value.denominator}" if value.denominator != 1 else str(value.numerator)


def _sign(text: str) -> str:
    for pattern, sign in _OPERATORS_IN_WORDS:
        if pattern.fullmatch(text):
            return sign
    return "*" if text.strip() == "x" else text.strip()


_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluated(text: str) -> Fraction | None:
    """The exact value of a sum of numbers; `None` where it is none, or too large to be one of a problem."""
    text = text.replace("^", "**")
    if len(text) > 300 or not re.fullmatch(r"[\d\s.+\-*/()]+", text):
        return None
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = _value(node.operand)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            if right.denominator != 1 or abs(right) > 40 or abs(left) > 10**6:
                raise ValueError("too large")
            value = Fraction(left) ** int(right)
        else:
            value = _BINARY[type(node.op)](left, right)
        if abs(value) > _MOST:
            raise ValueError("too large")
        return value
    raise ValueError("not a sum")
