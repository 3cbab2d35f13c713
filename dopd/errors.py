"""Errors a user can act on. Each is also the standard type that callers would catch without knowing dopd."""

import difflib
import re
from collections.abc import Iterable
from typing import get_args

_NUMBERS = re.compile("[0-9]+")


class DopdError(Exception):
    """Base class: the command line prints its message, without a traceback, and exits with its `exit_status`."""

    exit_status = 2


class ConfigError(DopdError, ValueError):
    """A setting, a routing table or a combination of both that cannot work."""


class DataError(DopdError, ValueError):
    """A dataset, a column or a row that cannot be used."""


class ModelError(DopdError, ValueError):
    """A checkpoint that cannot be read, or two models that cannot be compared token by token."""


class ScoringError(DopdError, RuntimeError):
    """Numbers that cannot be right: a NaN loss, a dead teacher, log-probabilities above zero."""


class NotFiniteError(ScoringError):
    """NaN or infinity where a number must be.

    Args:
        source (`str`): what gave it: a source of scores, a weight, the loss, the verifier.
        rows (`tuple[int, ...]`): which completions of this process's batch it was found at; empty if it is not known.
    """

    def __init__(self, message: str, *, source: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.source, self.rows = source, rows


class ServerError(DopdError, RuntimeError):
    """A server that refuses what it is asked, or whose replies cannot be right."""


class ServerLostError(ServerError):
    """A server that does not answer, however often it is asked: the same run may go on when it is back."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h, which batch systems know as "try again later"


class IncompleteError(DopdError, RuntimeError):
    """Not all that was asked for, by a limit that the user has set: what there is, is kept, and can be gone on with."""

    exit_status = 1


class FileError(DopdError, OSError):
    """A file or folder that cannot be written, or is not ours to write."""


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for one of ours."""
    text = str(error).strip()
    first = (text.splitlines() or ["no message"])[0]
    if "trust_remote_code" in text and "trust_remote_code" not in first:  # the way out stands further down
        return f"{first} Set trust_remote_code=true to run it, if you have read it"
    return first


def cut(text: str, length: int = 60) -> str:
    """The first `length` characters of a text, and that there are more."""
    return text if len(text) <= length else f"{text[:length]}..."


def did_you_mean(wrong: object, names: Iterable[str], most: int = 1, likeness: float = 0.6) -> str:
    """` Did you mean 'a' or 'b'?` with at most so many of the known names that are close, or `""`."""
    text = str(wrong)[:100]
    others = [name for name in names if _may_be_slip(_NUMBERS.findall(text), _NUMBERS.findall(name))]
    close = sorted(difflib.get_close_matches(text, others, n=most, cutoff=likeness))
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _may_be_slip(numbers: list[str], others: list[str]) -> bool:
    """Whether numbers in a name may stand for those of another: another number, as in float64 beside float16, is no
    slip of the pen; a digit too many, as in figure33, is.
    """
    if not numbers or not others or numbers == others:
        return True
    if len(numbers) != len(others):
        return False
    for one, other in zip(numbers, others, strict=True):
        longer, shorter = (one, other) if len(one) > len(other) else (other, one)
        without_one = {longer[:place] + longer[place + 1 :] for place in range(len(longer))}
        if one != other and shorter not in without_one:
            return False
    return True


def check_choice(field: str, value: object, choices: object) -> None:
    """Raise `ConfigError` unless `value` is one of the strings of a `Literal`."""
    allowed = get_args(choices)
    if value not in allowed:
        choices_text = ", ".join(map(repr, allowed))
        raise ConfigError(f"{field} (={value!r}) must be one of {choices_text}.{did_you_mean(value, allowed)}")
