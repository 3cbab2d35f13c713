"""Verifiers that compare an answer with the column `answer`: `math`, `exact`, `choice`."""

import re
from collections.abc import Mapping
from typing import Any

from dopd.data.checks import renaming
from dopd.errors import DataError
from dopd.hints.answers import boxed, options_of
from dopd.inspection.schema import prompt_text
from dopd.tasks.gsm_symbolic import same_number_or_formula

_DRESS = r"[\s$*_`\"'().:{}\[\]\\,;!]*"
_LATEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathsf|boldsymbol|bf|rm|left|right)(?![A-Za-z])")
_LONE = re.compile(rf"{_DRESS}([A-J]){_DRESS}")
_WITH_TEXT = re.compile(r"[\s$*_`\"']*[(\[]?([A-J])(?:[)\].:][\s$*_`\"')]*(?=\S)| *[-\u2013] +)")
_NOUN = r"(?:answer|choice|option|letter|response)"
_STATED = re.compile(
    rf"\b{_NOUN}\b(?:\s+(?:is|would be|must be|should be))?\s*(?:[:=]|\b)\s*(?:{_NOUN}\b\s*)?"
    r"[$*_`\"'(\[{\\ ]*(?:text\{|textbf\{|mathrm\{)?[(\[]*(?!I [a-z])([A-J])(?![A-Za-z0-9'])",
    re.I,
)
# "The answer is Venus."
_STATED_TEXT = re.compile(rf"\b{_NOUN}\b\s*(?:is|would be|must be|should be|[:=])\s*(\S.*)$", re.I | re.M)
_THOUGHT = "</think>"  # what stands before it is no answer yet


def math(completion: str, row: Mapping[str, Any]) -> float:
    """1 if math-verify finds the answer in the conclusion of the completion.

    Raises:
        ConfigError: math-verify is not installed.
        DataError: the row has no column `answer`.
    """
    return same_number_or_formula(completion, str(_answer(row)))


def exact(completion: str, row: Mapping[str, Any]) -> float:
    """1 if the answer is the column `answer`, blanks around it aside, or has it in its last `\\boxed{...}`.

    Raises:
        DataError: the row has no column `answer`.
    """
    wanted = str(_answer(row)).strip()
    return float(wanted in (completion.strip(), *(one.strip() for one in boxed(completion)[-1:])))


def choice(completion: str, row: Mapping[str, Any]) -> float:
    """1 if the answer states the letter of the row's `answer` (A to J), as its conclusion.

    Read are, behind `</think>` and in this order: the last `\\boxed{...}`; the last "the answer is (B)", or with an
    option's text; the last line, if it is a letter alone or an option with its text. Parentheses, LaTeX, bold and full
    stops around a letter are no part of it. The text of an option counts as its letter, where the row has the options:
    in `choices` or `options`, or as lines
    `A) ...` of its prompt. `answer` may be a letter in any of these ways, the text of an option, or, with `choices`
    or `options` in the row, a number counted from 0.

    Raises:
        DataError: the row has no column `answer`, or what it holds is none of the options.
    """
    options = _options(row)
    return float(stated_choice(completion, options) == _wanted(_answer(row), options))


def stated_choice(completion: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer states; `None` where it states none, or several."""
    completion = completion.rpartition(_THOUGHT)[2]
    if boxes := boxed(completion):
        return _letter(boxes[-1], options)
    plain = _LATEX.sub("", completion)
    if stated := [found for found in _STATED.finditer(plain) if found[1].isupper()]:
        return stated[-1][1] if not _goes_on(plain[stated[-1].end() :]) else None
    in_words = [letter for text in _STATED_TEXT.findall(plain) if (letter := _option_with(text, options))]
    if in_words:
        return in_words[-1]
    lines = [line for line in plain.splitlines() if line.strip()]
    return _letter(lines[-1], options) if lines else None


def _goes_on(rest: str) -> bool:
    """Whether another letter is offered beside the first: "B or C"."""
    return re.match(r"[)\]}*$ ]*(?:or|and|/|,)[ (\[*$]*[A-J](?![A-Za-z0-9'])", rest) is not None


def _wanted(answer: Any, options: Mapping[str, str]) -> str:
    text = (boxed(str(answer)) or [str(answer)])[-1].strip()
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    letter = None if is_number or answer is None else _letter(text, options)
    if letter is None and text.isdecimal() and int(text) < 10:  # counted from 0; as text in a CSV file
        letter = chr(ord("A") + int(text))
    if letter is None and len(text) == 1:
        letter = text.upper() if "A" <= text.upper() <= "J" else None
    if letter is None or (options and letter not in options) or (not options and text.isdecimal()):
        there = ", ".join(f"{name}) {option[:30]}" for name, option in options.items()) or "none"
        raise DataError(
            f"column 'answer' (={str(answer)[:60]!r}) names none of the row's options ({there}): it must be a "
            "letter from A to J, an option's text, or, with a column 'choices' or 'options', a number counted from 0"
        )
    return letter


def _letter(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a short text is; that of an option with this text; or that in front of an option's text."""
    plain = _LATEX.sub("", text)
    if found := _LONE.fullmatch(plain):
        return found[1]
    if same := _option_with(plain, options):
        return same
    if found := _WITH_TEXT.match(plain):
        letter, option = found[1], options.get(found[1])
        return letter if option is None or _bare(plain[found.end() :]) == _bare(option) else None
    return None


def _option_with(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option with this text."""
    same = [letter for letter, option in options.items() if _bare(option) == _bare(text)]
    return same[0] if len(same) == 1 else None


def _bare(text: str) -> str:
    return re.sub(rf"^{_DRESS}|{_DRESS}$", "", " ".join(text.split())).casefold()


def _options(row: Mapping[str, Any]) -> dict[str, str]:
    for name in ("choices", "options"):
        value = row.get(name)
        if isinstance(value, Mapping) and isinstance(value.get("text"), list):  # as in ARC
            value = value["text"]
        if isinstance(value, Mapping):
            return {str(letter): str(text) for letter, text in value.items() if text is not None}
        if isinstance(value, list | tuple):
            return {chr(ord("A") + place): str(text) for place, text in enumerate(value[:10])}
    return options_of(prompt_text(row["prompt"])) if row.get("prompt") is not None else {}


def _answer(row: Mapping[str, Any]) -> Any:
    if "answer" not in row:
        raise DataError(
            f"the verifier needs a column 'answer'; the row has {', '.join(row)}: write {renaming('answer', 'NAME')}"
        )
    return row["answer"]
