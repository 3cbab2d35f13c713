"""Formulas, lists of numbers and times of day in a hint that give the answer away."""

import importlib.util
import re
from collections.abc import Iterator
from itertools import pairwise

from dopd.hints import phrases
from dopd.hints.answers import Answer, amounts, boxed
from dopd.hints.numbers import Mention, mentions
from dopd.hints.text import clause_after, clause_before, squeezed

_SPACES = r"[\s$]*"
_FORMULA = re.compile(
    r"\$([^$]+)\$"
    r"|((?:\([^()\n]{1,30}\)\s*){2,})"
    r"|([^\s$]*\\(?:sqrt|frac|pi)\b[^\s$]*)"
    r"|(?<![\w.])((?:[\d.]*[a-z]?(?:\^\{?\d+\}?)?\s*[-+*/]\s*)+[\d.]*[a-z]?(?:\^\{?\d+\}?)?)(?!\w)"
    r"|(?<==)([^=.;\n]{1,60})"
    r"|(?<=is )([-(\[{\\\w][^.;\n]{0,60})"
)
_TIME = re.compile(r"(?<!\d)(\d{1,2})[:.h](\d{2})(?!\d)\s*(am|pm|a\.m|p\.m)?", re.I)
_LIST = re.compile(r"[({\[]?\s*-?\d+(?:\.\d+)?(?:\s*(?:,|;|and)\s*-?\d+(?:\.\d+)?)+\s*[)}\]]?")
_CANDIDATES, _LONGEST = 12, 120


def formula_kinds(text: str, question: str, answer: Answer) -> dict[str, str]:
    """An answer that is a formula, a list of numbers or a time: as it is written, or in another order."""
    wanted = answer.formula
    if time := _TIME.fullmatch(answer.text.strip(" .")):
        quoted = next((one.group() for one in _TIME.finditer(text) if _minutes(one) == _minutes(time)), None)
        return {"equivalent": quoted} if quoted else {}
    if _LIST.fullmatch(answer.text.strip()):
        return _list_kinds(text, question, answer)
    if len(wanted) < 3:
        return {}
    restated = wanted in squeezed(question)
    for found in re.finditer(rf"(?<![\w+*/^(-]){_SPACES.join(map(re.escape, wanted))}(?![\w*/^(])", text, re.I):
        before, after = clause_before(text, found.start()), clause_after(text, found.end())
        if not restated or phrases.NAMED.search(before) or phrases.IS_ANSWER.search(after):
            return {"verbatim": found.group()}
    if not restated:
        for one in _formulas(text):
            if _rearranged(one) == _rearranged(wanted):
                return {"equivalent": one}
    return {}


def amount_kinds(text: str, answer: Answer) -> dict[str, str]:
    """An answer of several quantities (2 hours 30 minutes), however it is put together."""
    wanted = amounts(answer.text)
    if answer.values or len(wanted) != 1:
        return {}
    quoted = next((part for kind, total, part in amounts(text) if (kind, total) == wanted[0][:2]), None)
    return {"equivalent": quoted, "unit": quoted} if quoted else {}


def _minutes(time: re.Match[str]) -> int:
    """Minutes after noon or midnight."""
    return (int(time[1]) % 12) * 60 + int(time[2])


def _list_kinds(text: str, question: str, answer: Answer) -> dict[str, str]:
    """The numbers of a list beside one another, of which the question has not all."""
    wanted = [one for one in mentions(answer.text) if not one.operands]
    quoted = [one for one in mentions(text) if not one.operands]
    theirs = [one for one in mentions(question) if not one.operands]
    asked = {value for one in theirs for value in one.values}
    size = len(wanted)
    in_order = any(_is_run(theirs[n : n + size], wanted) for n in range(len(theirs) - size + 1))
    for n in range(len(quoted) - size + 1):
        part = quoted[n : n + size]
        close = all(b.start - a.end <= 25 for a, b in pairwise(part))
        ordered = _is_run(part, wanted)
        mixed = sorted(min(a.values) for a in part) == sorted(min(b.values) for b in wanted)
        new = (
            any(not one.values & asked for one in part)
            or (ordered and not in_order)
            or phrases.NAMED.search(clause_before(text, part[0].start))
        )
        if close and new and (ordered or (mixed and not answer.text.startswith("("))):
            return {"equivalent": text[part[0].start : part[-1].end]}
    return {}


def _is_run(part: list[Mention], wanted: list[Mention]) -> bool:
    """Whether numbers are those of a list, in its order."""
    return len(part) == len(wanted) and all(a.values & b.values for a, b in zip(part, wanted, strict=True))


def _formulas(text: str) -> Iterator[str]:
    for found in _FORMULA.finditer(text):
        part = next((group for group in found.groups() if group), "").strip()
        yield from (side.strip(" ,$") for side in part.split("="))


def _rearranged(formula: str) -> str:
    """A product with its factors, and a sum with its terms, in alphabetical order."""
    own = squeezed(formula).replace("*", "").replace("{", "").replace("}", "")
    factors = re.findall(r"\(([^()]+)\)", own)
    if factors and "".join(f"({one})" for one in factors) == own:
        return "".join(sorted(f"({_terms(one)})" for one in factors))
    return _terms(own)


def _terms(own: str) -> str:
    return "".join(sorted(re.findall(r"[+-][^+-]+", own if own.startswith(("+", "-")) else f"+{own}")))


def equivalent(text: str, question: str, answer: Answer) -> str | None:
    """A formula of the hint that math-verify takes for the answer; `None` where it is not installed, or where the
    question has a formula that is equal to it (simplify, expand, factor).
    """
    if importlib.util.find_spec("math_verify") is None or _explodes(answer.text):
        return None
    candidates = [one for one in dict.fromkeys(_candidates(text, question)) if not _explodes(one)][:_CANDIDATES]
    if not candidates:
        return None
    from math_verify import LatexExtractionConfig, parse, verify

    # As LaTeX alone: plain expressions are read by sympy's parse_expr, which evaluates text as Python.
    as_latex = (LatexExtractionConfig(),)
    gold = parse(f"${answer.text}$", as_latex, parsing_timeout=1)

    def is_gold(formula: str) -> bool:
        return bool(verify(gold, parse(f"${formula}$", as_latex, parsing_timeout=1), timeout_seconds=1))

    quoted = next((one for one in candidates if is_gold(one)), None)
    theirs = [one for one in _formulas(question) if one and len(one) <= _LONGEST and not _explodes(one)]
    return None if quoted is None or any(map(is_gold, theirs[:_CANDIDATES])) else quoted


def _explodes(formula: str) -> bool:
    """Whether working a formula out could take long: powers of powers, factorials, huge exponents."""
    return bool(re.search(r"\^\s*\{?\s*\d{3,}|\^[^+\-*/=,]*\^|!|\d{20,}", formula))


def _candidates(text: str, question: str) -> Iterator[str]:
    """Formulas that a hint states: in a box, named as the answer, or not the question's."""
    yield from boxed(text)
    asked = squeezed(question)
    for found in _FORMULA.finditer(text):
        named = phrases.NAMED.search(clause_before(text, found.start()))
        part = next((group for group in found.groups() if group), "").strip()
        for side in part.split("="):
            side = side.strip(" ,$")
            is_formula = (
                re.search(r"[\\^+*/()\[\]]|\d", side) and len(re.findall(r"[^\W\d_]{3,}", side.replace("sqrt", ""))) < 3
            )
            # Sums of numbers are looked at one by one elsewhere.
            worth = named or (re.search(r"[a-z\\]", side, re.I) and _is_own(side, asked))
            if is_formula and len(side) <= _LONGEST and worth:
                yield side


def _is_own(formula: str, asked: str) -> bool:
    """Whether a formula says something that the question does not: not itself, and not a sum of its numbers alone."""
    numbers = set(re.findall(r"\d+", formula))
    of_numbers = bool(numbers) and not re.search(r"[^\W\d_]", formula.replace("sqrt", ""))
    return squeezed(formula) not in asked and not (of_numbers and numbers <= set(re.findall(r"\d+", asked)))
