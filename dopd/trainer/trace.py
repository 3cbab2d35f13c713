"""Traces: some completions of a run, token by token, as JSON lines that reports read (`docs/reference/trace.md`).

What is traced is what training computes anyway: the loss of a token is the one that was differentiated. Only the most
probable tokens are made for the trace alone, from hidden states of the traced completions, a few tokens at a time.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dopd.assignment import Assignment
from dopd.files import append_line
from dopd.heads import Head
from dopd.inspection.details import Completion, completion_record, thresholds_of, whole_models
from dopd.inspection.inspector import Inspector
from dopd.inspection.pictures import row_key
from dopd.inspection.schema import TRACE_FILE, mend_lines, read_trace, to_line
from dopd.loss import RoutedLoss
from dopd.step import Moment, Rollouts, ScoredBatch, Step
from dopd.trainer.owned import begin_growing

__all__ = ["TRACE_FILE", "TraceWriter", "read_trace"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """Fixed prompts that are answered again at every traced step.

    Attributes:
        inspector (`Inspector`): answers them.
        rows (`list[dict]`): of the training data.
    """

    inspector: Inspector
    rows: Sequence[Mapping[str, Any]]

    def records(self, moment: Moment, *, batch: Assignment, first_number: int) -> list[dict[str, Any]]:
        """One record of each row, decided about as the tokens of a batch were."""
        # As many rollouts of each as training makes: signals compare them, and need not say so.
        rows = [row for row in self.rows for _ in range(moment.num_generations)]
        return self.inspector.records(rows, batch=batch, kind="probe", moment=moment, first_number=first_number)


class TraceWriter:
    """Writes the first completions of an optimizer batch, every so many steps, and of the last step.

    Args:
        folder (`str` or `Path`): the run folder.
        step (`Step`): scores what is traced.
        every (`int`): steps from one traced step to the next.
        examples (`int`): completions of a traced step.
        max_bytes (`int`): the file never grows beyond this; records that would not fit are counted in `dropped`.
        probe (`Probe`, *optional*): fixed prompts.
        writes (`bool`): whether this process writes; the others take part where weights are sharded.
    """

    def __init__(
        self,
        folder: str | Path,
        step: Step,
        *,
        every: int,
        examples: int,
        max_bytes: int = 2**26,
        probe: Probe | None = None,
        writes: bool = True,
    ) -> None:
        self.dropped = 0
        self._path = Path(folder) / TRACE_FILE
        self._step = step
        self._every, self._examples, self._max_bytes = every, examples, max_bytes
        self._probe, self._writes = probe, writes
        self._pending: dict[int, Completion] = {}
        self._records: dict[int, dict[str, Any]] = {}
        self._thresholds: dict[str, float] | None = None
        self._traces = False  # the batch that is trained on now

    def wants(self, step: int, last_step: int) -> bool:
        """Whether the batch of the step that is about to be made (counted from 0) is traced."""
        return step % self._every == 0 or step == last_step - 1

    def start(self, step: int) -> None:
        """Begin a run at `step`: keep only what earlier steps wrote, each completion once."""
        self._pending, self._records = {}, {}
        if self._writes:
            seen: set[tuple[int, Any]] = set()

            def keep(record: dict[str, Any]) -> bool:
                place = (record["step"], record.get("row"))
                if record["step"] >= step or place in seen:
                    return False
                seen.add(place)
                return True

            begin_growing(self._path.parent, TRACE_FILE, step)
            warn_of_torn_records(self._path, mend_lines(self._path, keep))

    def follow(self, rollouts: Rollouts, batch: ScoredBatch, moment: Moment, last_step: int, *, first: bool) -> None:
        """Choose what to trace of a scored batch, for `observe`.

        Args:
            rollouts (`Rollouts`), batch (`ScoredBatch`): of this rank.
            moment (`Moment`): where in the run they stand.
            last_step (`int`): steps of the run.
            first (`bool`): whether this is the first batch since the run began or was resumed.
        """
        if first or moment.step == 0:
            self.start(moment.step)
        self._records, self._pending = {}, {}
        self._traces = self.wants(moment.step, last_step)
        if not self._traces or not self._writes:
            return
        count = min(self._examples, len(rollouts.rows))
        seen: dict[str, int] = {}
        for number, row in enumerate(rollouts.rows[:count]):
            key = row_key(row)
            rollout = seen.get(key, 0)
            self._pending[number] = Completion.of(
                rollouts, number, row, step=moment.step, number=number, rollout=rollout, kind="batch"
            )
            seen[key] = rollout + 1
        self._thresholds = thresholds_of(batch)
        if self._probe is not None:
            records = self._probe.records(moment, batch=batch.assignment, first_number=count)
            self._records = {record["row"]: record for record in records}

    def observe(
        self,
        batch: ScoredBatch,
        student: tuple[Tensor, Head],
        targets: Mapping[str, tuple[Tensor, Head]],
        routed: RoutedLoss,
    ) -> None:
        """Keep what the loss of a micro-batch says of the traced completions in it.

        Args:
            batch (`ScoredBatch`): the micro-batch.
            student (`tuple[Tensor, Head]`): hidden states (B, T, H) and head of the plain student.
            targets (`dict[str, tuple[Tensor, Head]]`): the same of the sources.
            routed (`RoutedLoss`): the loss of the micro-batch.
        """
        if not self._traces:
            return
        models = whole_models(student, targets)
        for place, number in enumerate(batch.numbers.tolist()):
            if number in self._pending:
                self._records[number] = completion_record(
                    self._pending[number], self._step, batch, place, models, routed.per_token, self._thresholds
                )

    def finish(self) -> None:
        """Append the completions of the step, each as one whole line."""
        for number in sorted(self._records):
            self.append(self._records[number])
        self._pending, self._records = {}, {}

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record, or count it if the file has no room for it."""
        line = to_line(record)
        size = self._path.stat().st_size if self._path.exists() else 0
        if size + len(line) <= self._max_bytes:
            append_line(self._path, line)
            return
        if not self.dropped:
            logger.warning(
                f"{self._path.name} has reached trace_max_bytes (={self._max_bytes}): from step {record['step']} on, "
                "completions that do not fit are counted and left out"
            )
        self.dropped += 1


def warn_of_torn_records(path: Path, count: int) -> None:
    """Say that lines of a file were not whole, and are left out."""
    if count:
        logger.warning(f"{path}: {count} line(s) that were cut off, or are no records, are left out")
