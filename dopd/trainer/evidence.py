"""What a step was about, kept until the next one: if its numbers are not finite, it is saved to be looked at."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dopd.errors import NotFiniteError
from dopd.scoring import unpadded
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
        self._tensors: dict[str, Tensor] = {}

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A step begins with these rows of the dataset."""
        self._rows, self._tensors = rows, {}

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Completions, or scores of their tokens; nothing that is large is kept."""
        small = ("completion_ids", "completion_mask")
        self._tensors |= {k: v for k, v in batch.items() if k in small or k.startswith("logprobs/")}

    def told(self, error: NotFiniteError, step: int) -> NotFiniteError:
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
        if "completion_mask" in self._tensors:
            mask = self._tensors["completion_mask"]
            for name, values in self._tensors.items():
                if name != "completion_mask":
                    for row, kept in zip(rows, unpadded(values, mask), strict=True):
                        row[name] = kept
            for row in rows:
                row["completion"] = self._tokenizer.decode(row["completion_ids"])
        for number, row in enumerate(rows):
            row["found_here"] = number in error.rows if error.rows else None
        return {"step": step, "source": error.source, "error": str(error), "answers": rows}


def _described(value: Any) -> str:
    """Pictures and the like: what they are, not what is in them."""
    return f"<{type(value).__module__}.{type(value).__name__}>"
