"""A verifier is the user's code: it is tried before training, and every score is checked."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dopd.errors import DopdError, NotFiniteError, ScoringError, cut, first_line
from dopd.guests import as_guest
from dopd.interrupts import Stopped, TooLongError, alarm_after

# (completion text, dataset row) -> score in [0, 1]
Verifier = Callable[[str, Mapping[str, Any]], float]

_SHOWN = 80  # characters of a completion, or of what is not a score, in a message
_PASS = (KeyboardInterrupt, Stopped, TooLongError)  # signals and alarms, which are not the verifier's own


def unjudged(completion: str, row: Mapping[str, Any]) -> float:
    """In the place of a verifier where there is none."""
    return 0.0


def judged(verifier: Verifier, completion: str, row: Mapping[str, Any]) -> float:
    """A verifier's score of a completion.

    Raises:
        ScoringError: it raises, or gives no number from 0 to 1. A reward on another scale would be read as an accuracy.
    """
    try:
        with as_guest("the verifier"):
            value = verifier(completion, own_copy(row))
    except (DopdError, *_PASS):
        raise
    except BaseException as error:  # SystemExit, too: it would end a run as if it were done
        raise ScoringError(
            f"the verifier raised {type(error).__name__}: {first_line(error)}, for {quoted(completion)}. It is called "
            f"with the answer's text and the dataset's row ({', '.join(map(str, row))}), and gives a number from 0 "
            "(wrong) to 1 (right) for whatever a model writes"
        ) from error
    if inspect.isawaitable(value):
        if inspect.iscoroutine(value):
            value.close()  # or Python warns that nobody awaited it
        raise ScoringError("the verifier is asynchronous: give a function that waits for the score and returns it")
    try:
        score = math.nan if isinstance(value, str) else float(value)
    except Exception:  # of whatever object it is
        score = math.nan
    if not 0.0 <= score <= 1.0:
        message = (
            f"the verifier gave {shown(value)} for {quoted(completion)}: a score must be a number from 0 (wrong) to "
            "1 (right). Scale it in the verifier"
        )
        raise ScoringError(message) if math.isfinite(score) else NotFiniteError(message, source="verifier")
    return score


def prepare(verifier: Verifier, answers: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Tell a verifier that has a method `prepare` which answers are judged next: one that waits for a server can ask
    about all of them at a time.
    """
    ahead = getattr(written_code(verifier), "prepare", None)
    if ahead is not None:
        with as_guest("the verifier"):
            ahead([(text, own_copy(row)) for text, row in answers])


def own_copy(value: Any) -> Any:
    """Dictionaries and lists, through all levels, for users' code to change; what they hold is not copied."""
    if type(value) is dict:  # not of other classes, whose way to be made is unknown
        return {key: own_copy(one) for key, one in value.items()}
    if type(value) is list:
        return [own_copy(one) for one in value]
    return value


@dataclass(frozen=True)
class TimedVerifier:
    """A verifier that is stopped after some seconds, as far as that can be done: see `alarm_after`.

    Attributes:
        verifier (callable): as the user wrote it.
        seconds (`float`): for one answer.
    """

    verifier: Verifier
    seconds: float

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """The score.

        Raises:
            ScoringError: it took longer.
        """
        try:
            with alarm_after(self.seconds, f"the verifier, for {quoted(completion)},"):
                return self.verifier(completion, row)
        except TooLongError:
            raise ScoringError(
                f"the verifier took more than verifier_timeout (={self.seconds:g}) seconds for {quoted(completion)}: "
                "make it faster, or raise verifier_timeout"
            ) from None


@dataclass(frozen=True)
class TriedVerifier:
    """A verifier that has scored an answer of each kind of row; made by `tried`."""

    score: Verifier

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        return self.score(completion, row)


def written_code(verifier: Verifier) -> Verifier:
    """A verifier as the user wrote it, without what was put around it."""
    if isinstance(verifier, TriedVerifier):
        verifier = verifier.score
    return verifier.verifier if isinstance(verifier, TimedVerifier) else verifier


def tried(verifier: Verifier, seconds: float | None, datasets: Iterable[Any]) -> TriedVerifier:
    """Ask for the score of an empty answer to the first row of each dataset, before anything expensive.

    Args:
        verifier (callable): one that was tried before is not asked again.
        seconds (`float`, *optional*): that it may take for one answer.
        datasets: those that are `None` are left out.

    Raises:
        ScoringError: as `judged`.
    """
    if isinstance(verifier, TriedVerifier):
        return verifier
    tried = TriedVerifier(verifier if seconds is None else TimedVerifier(verifier, seconds))
    for dataset in datasets:
        try:
            row = next(iter(dataset))
        except Exception:
            continue
        judged(tried, "", row)
    return tried


def shown(value: Any) -> str:
    """The `repr` of whatever object it is, short."""
    try:
        text = repr(value)
    except Exception:  # of whatever object it is
        text = f"a {type(value).__name__}"
    return cut(text, _SHOWN)


def quoted(completion: str) -> str:
    """An answer for a message."""
    return f"the answer {completion[:_SHOWN]!r}{'...' if len(completion) > _SHOWN else ''}"
