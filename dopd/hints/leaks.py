"""What a hint gives away on its surface: its answer however it is written, results of steps, words of the solution."""

import importlib.util
import re
from dataclasses import dataclass
from fractions import Fraction

from dopd.hints import phrases
from dopd.hints.answers import Answer, read_answer
from dopd.hints.choice_leaks import option_kinds, truth_kinds, word_kinds
from dopd.hints.formula_leaks import amount_kinds, equivalent, formula_kinds
from dopd.hints.kinds import WITHOUT_RESULTS
from dopd.hints.number_leaks import Numbers, number_kinds, results
from dopd.hints.text import folded, plain, words
from dopd.wording import runs

# Kinds of leaks, and what each means.
KINDS = {
    "verbatim": "the answer as it is written",
    "equivalent": "the answer in another way of writing it",
    "number": "a number that is the answer",
    "unit": "the answer with its unit, or in another unit",
    "option": "the letter of the right option",
    "yes_no": "yes or no, where that is the answer",
    "overlap": "sentences of the solution",
    "result": "results of steps, where p is to leave them to the reader",
}
_RUN = 6  # words in a row
_SHARE, _FEWEST = 0.3, 3  # of the solution's runs of words
_LANGUAGES = ("de", "fr", "es", "it", "pt", "nl", "ru", "pl", "sv", "tr")
_DIGIT_SIGNS = {sign: n for n, sign in enumerate("\u96f6\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d")}
_SCALE_SIGNS = {"\u5341": 10, "\u767e": 100, "\u5343": 1000}


def not_looked_for() -> list[str]:
    """What is not looked for because a library is not installed, a sentence each."""
    libraries = {
        "math_verify": "formulas count as the answer only where they are written as it is (with math-verify: if equal)",
        "num2words": "numbers in words are known in English alone",
    }
    missing = [quoted for name, quoted in libraries.items() if importlib.util.find_spec(name) is None]
    return [f"{quoted}: pip install 'dopd[hints]'" for quoted in missing]


@dataclass(frozen=True)
class Hint:
    """A row, as far as leaks depend on it.

    Attributes:
        text (`str`): p.
        question (`str`): the prompt's text.
        answer (`str`, *optional*): the final answer.
        solution (`str`): how it is reached, or `""`.
        kind (`str`): of p, one of those of `dopd hints write`.
    """

    text: str
    question: str = ""
    answer: str | None = None
    solution: str = ""
    kind: str = "steps"


def leaks_of(hint: Hint) -> dict[str, str]:
    """Kinds of leaks of one hint, each with the words that give something away; empty for a clean one."""
    text, question, solution = plain(hint.text), plain(hint.question), plain(hint.solution)
    numbers = Numbers(text, question)
    answer = None if hint.answer is None else read_answer(hint.answer, question)
    found: dict[str, str] = {}
    if answer is not None:
        found |= _of_answer(text, question, numbers, answer)
    if (share := overlap(text, question, solution)) >= _SHARE:
        found["overlap"] = f"{share:.0%} of the solution's phrases"
    if hint.kind in WITHOUT_RESULTS:
        executed = results(numbers, solution, answer)
        if executed:
            found["result"] = executed[0]
    return found


def _of_answer(text: str, question: str, numbers: Numbers, answer: Answer) -> dict[str, str]:
    if answer.truth is not None:
        return truth_kinds(text, answer.truth, question)
    found = amount_kinds(text, answer)
    if answer.letter:
        found |= option_kinds(text, answer)
    if answer.values:
        found |= number_kinds(numbers, answer)
        if "number" not in found and (quoted := _in_other_languages(text, answer, numbers)):
            found |= {"number": quoted, "equivalent": quoted}
    elif answer.formula:
        found |= formula_kinds(text, question, answer)
        found |= {} if found or not _is_texty(answer) else word_kinds(text, question, answer)
    else:
        found |= word_kinds(text, question, answer)
    if not found and (answer.values or answer.formula) and (quoted := equivalent(text, question, answer)):
        found["equivalent"] = quoted
    return found


def _is_texty(answer: Answer) -> bool:
    return len(answer.words) > 1 and any(len(word) > 2 for word in answer.words)


def _in_other_languages(text: str, answer: Answer, numbers: Numbers) -> str | None:
    """A whole number in the words of another language."""
    value = next(iter(answer.values))
    if value.denominator != 1 or not 0 <= value < 10**9 or value in numbers.asked:
        return None
    signs = re.findall(f"[{''.join(_DIGIT_SIGNS)}{''.join(_SCALE_SIGNS)}]+", text)
    if any(len(one) > 1 and _of_signs(one) == value for one in signs):
        return next(one for one in signs if _of_signs(one) == value)
    if importlib.util.find_spec("num2words") is None or all(
        word.isascii() and word in _ENGLISH for word in words(text)[:5]
    ):
        return None
    from num2words import num2words

    own = folded(text)
    for language in _LANGUAGES:
        quoted = folded(str(num2words(int(value), lang=language)))
        for found in re.finditer(rf"(?<![^\W_]){re.escape(quoted)}(?![^\W_])", own):
            if value > 12 or phrases.NAMED.search(own[: found.start()]):
                return quoted
    return None


_ENGLISH = frozenset(
    (
        "the",
        "first",
        "then",
        "find",
        "start",
        "use",
        "compute",
        "think",
        "of",
        "it",
        "and",
        "to",
        "add",
        "multiply",
        "a",
        "what",
        "how",
        "you",
        "we",
        "step",
    )
)


def _of_signs(text: str) -> Fraction | None:
    """The value of a number in Chinese or Japanese signs."""
    total, current = 0, 0
    for sign in text:
        if sign in _SCALE_SIGNS:
            total += (current or 1) * _SCALE_SIGNS[sign]
            current = 0
        else:
            current = current * 10 + _DIGIT_SIGNS[sign]
    return Fraction(total + current)


def overlap(hint: str, question: str, solution: str) -> float:
    """Share of the solution's runs of six words that the hint has; 0 where they are few.

    What the question has does not count and, where a solution works numbers out, a run without one of these neither:
    a plan may be in the solution's words.
    """
    asked = set(words(question))
    theirs = _phrases(solution) - _phrases(question)
    own = {word for word in words(solution) if word[0].isdigit() and word not in asked}
    if own:
        theirs = {run for run in theirs if own & set(run)}
    shared = theirs & _phrases(hint)
    return len(shared) / len(theirs) if len(shared) >= _FEWEST else 0.0


def _phrases(text: str) -> set[tuple[str, ...]]:
    return runs(folded(text), _RUN)
