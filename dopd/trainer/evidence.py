"""What a step was about, kept until the next one: if its numbers are not finite, it is saved to be looked at."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopd.errors import NotFiniteError
from dopd.scoring import unpadded
from dopd.step import Rollouts, ScoredBatch
from dopd.trainer.owned import write_own

NON_FINITE_FILE = "non_finite.json"


class Evidence:
    """The rows of a step, its completions and their scores.

    Args:
        run (`Path`): the run folder.
        tokenizer: for the text of completions.
        process (`int`): number of this process, whose rows these are.
    """

    def __init__(self, run: Path, tokenizer: Any, process: int) -> None:
        name = NON_FINITE_FILE if process == 0 else f"non_finite-{process}.json"
        self._file, self._tokenizer = run / name, tokenizer
        self._rows: Sequence[Mapping[str, Any]] = ()
        self._answers: list[list[int]] = []
        self._scores: dict[str, list[list[float]]] = {}

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A step begins with these rows of the dataset."""
        self._rows, self._answers, self._scores = rows, [], {}

    def add_answers(self, rollouts: Rollouts) -> None:
        """The rows are answered."""
        self._answers = rollouts.answers

    def add_scores(self, batches: Sequence[ScoredBatch]) -> None:
        """The answers, or the texts in their place, are scored; nothing that is large is kept."""
        for batch in batches:
            where = "" if len(batches) == 1 else f" (text {batch.table.text}, view {batch.table.view})"
            for name, one in batch.sources.items():
                self._scores[name + where] = unpadded(one.tokens.logprobs, batch.mask)

    def with_evidence(self, error: NotFiniteError, step: int) -> NotFiniteError:
        """The error, with the place of the file in which the step now stands."""
        record = json.dumps(self._record(error, step), indent=1, default=_described)
        try:
            write_own(self._file.parent, self._file.name, record.encode())
            where = f"its rows and answers are in {self._file}"
        except OSError as failed:
            where = f"its rows and answers could not be saved ({failed})"
        found = f"found at answers {', '.join(map(str, error.rows))} of the step; " if error.rows else ""
        return NotFiniteError(f"{error}. To look at it: {found}{where}", source=error.source, rows=error.rows)

    def _record(self, error: NotFiniteError, step: int) -> dict[str, Any]:
        rows: list[dict[str, Any]] = [{"row": dict(row)} for row in self._rows]
        for row, ids in zip(rows, self._answers, strict=bool(self._answers)):
            row |= {"completion_ids": ids, "completion": self._tokenizer.decode(ids)}
        for name, of_rows in self._scores.items():
            for row, values in zip(rows, of_rows, strict=True):
                row[f"logprobs/{name}"] = values
        for number, row in enumerate(rows):
            row["found_here"] = number in error.rows if error.rows else None
        return {"step": step, "source": error.source, "error": str(error), "answers": rows}


def _described(value: Any) -> str:
    """Pictures and the like: what they are, not what is in them."""
    return f"<{type(value).__module__}.{type(value).__name__}>"
