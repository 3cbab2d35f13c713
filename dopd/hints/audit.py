"""The audit of a dataset's hints: what each gives away, and which cannot be used."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dopd.data.images import PRIVILEGED_COLUMN
from dopd.data.views import images_of
from dopd.errors import DataError
from dopd.hints.answers import answer_text
from dopd.hints.boxes import faults_of_boxes
from dopd.hints.coverage import Coverage, contradiction, duplicates, is_empty, is_other_language, num_words
from dopd.hints.leaks import KINDS, Hint, leaks_of
from dopd.inspection.schema import prompt_text
from dopd.progress import tracked

HINT_KIND = "hint_kind"  # a column that says which kind of p a row has; `dopd hints write` writes it


@dataclass
class Audit:
    """What was found in the hints of a dataset.

    Attributes:
        leaks (`dict[int, dict[str, str]]`): of the rows that leak, kinds with the words that give something away.
        coverage (`Coverage`): hints that cannot be used.
        num_judged (`int`): rows with a hint and an answer (or a solution that names it).
        hints (`list[Hint | None]`): of each row; `None` without a hint.
        behaviour (`dict`): what a model made of the hints; empty without one.
    """

    leaks: dict[int, dict[str, str]] = field(default_factory=dict)
    coverage: Coverage = field(default_factory=Coverage)
    num_judged: int = 0
    hints: list[Hint | None] = field(default_factory=list)
    behaviour: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Rows that leak, of those with a hint."""
        return len(self.leaks) / max(self.coverage.num_hints, 1)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by kind of leak, in the order of `KINDS`."""
        counted = Counter(kind for kinds in self.leaks.values() for kind in kinds)
        return {kind: counted[kind] for kind in KINDS}

    def to_json(self) -> dict[str, Any]:
        """`{"leaks": [{"row": 0, "kinds": [...]}], "coverage": {...}}`, and `behaviour` where a model was asked."""
        leaks = [{"row": row, "kinds": [kind for kind in KINDS if kind in kinds]} for row, kinds in self.leaks.items()]
        behaviour = {"behaviour": self.behaviour} if self.behaviour else {}
        return {"leaks": leaks, "coverage": self.coverage.to_json(), **behaviour}


def audit_rows(rows: Sequence[Mapping[str, Any]], *, kind: str = "steps", max_words: int = 300) -> Audit:
    """Look at the hint of every row.

    Args:
        rows: with `prompt` and `privileged_context`; `answer` and `solution` where there are any.
        kind (`str`): of the hints, where a row has no column `hint_kind`; results of steps are leaks in those of
            `dopd.hints.kinds.WITHOUT_RESULTS`.
        max_words (`int`): longer hints are counted.

    Raises:
        DataError: a hint that is no text.
    """
    found = Audit()
    found.coverage.num_rows = len(rows)
    for number in tracked("auditing hints", "row", range(len(rows))):
        row = rows[number]
        hint = hint_of(row, number, kind)
        found.hints.append(hint)
        if hint is None:
            if not images_of(row, (PRIVILEGED_COLUMN,)):
                found.coverage.add(number, "empty")
            continue
        found.coverage.num_hints += 1
        found.num_judged += hint.answer is not None
        leaks = leaks_of(hint)
        if leaks:
            found.leaks[number] = leaks
        _cover(found.coverage, row, number, hint, max_words)
    for number in duplicates((n, hint) for n, hint in enumerate(found.hints) if hint is not None):
        found.coverage.add(number, "duplicated")
    return found


def _cover(coverage: Coverage, row: Mapping[str, Any], number: int, hint: Hint, max_words: int) -> None:
    if wrong := contradiction(hint):
        coverage.add(number, "contradictory", wrong)
    if (length := num_words(hint.text)) > max_words:
        coverage.add(number, "over_long", f"{length} words, and {max_words} are allowed")
    if is_other_language(hint.text, hint.question):
        coverage.add(number, "language")
    if faults := faults_of_boxes(row):
        coverage.add(number, "boxes", faults[0])


def hint_of(row: Mapping[str, Any], number: int, kind: str = "steps") -> Hint | None:
    """The hint of a row with what its leaks depend on; `None` without one.

    Raises:
        DataError: it is no text.
    """
    text = row.get("privileged_context")
    if text is not None and not isinstance(text, str):
        raise DataError(f"row {number}, column 'privileged_context': expected text or None, got {type(text).__name__}")
    if text is None or is_empty(text):
        return None
    solution = row.get("solution")
    own = row.get(HINT_KIND)
    return Hint(
        text,
        prompt_text(row.get("prompt") or ""),
        answer_text(row),
        solution if isinstance(solution, str) else "",
        own if isinstance(own, str) and own else kind,
    )
