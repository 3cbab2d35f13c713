"""Traces: some completions of a run, token by token, as JSON lines that reports read (`docs/trace_schema.md`).

What is traced is what training computes anyway: the loss of a token is the one that was differentiated. Only the most
probable tokens are made for the trace alone, from hidden states of the traced completions, a few tokens at a time.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dopd.files import append_line
from dopd.heads import Head
from dopd.inspection.details import Completion, token_details, trace_record
from dopd.inspection.pictures import row_key
from dopd.inspection.schema import (
    MAX_TOKENS,
    TRACE_FILE,
    mend_lines,
    read_trace,
    to_line,
)
from dopd.loss import RoutedLoss
from dopd.tables import RoutingTable
from dopd.trainer.owned import own

__all__ = ["TRACE_FILE", "TraceWriter", "read_trace"]

logger = logging.getLogger(__name__)

TRACED = "trace_row"  # of a batch: the place of a traced completion among its step's, -1 where it is not traced


class TraceWriter:
    """Writes the first completions of an optimizer batch, every so many steps, and of the last step.

    Args:
        folder (`str` or `Path`): the run folder.
        table (`RoutingTable`): the method.
        tokenizer: turns ids into text.
        every (`int`): steps from one traced step to the next.
        examples (`int`): completions of a traced step.
        max_bytes (`int`): the file never grows beyond this; records that would not fit are counted in `dropped`.
        probe (callable, *optional*): makes records of fixed prompts (`Inspector.records`).
        writes (`bool`): whether this process writes; the others take part where weights are sharded.
    """

    def __init__(
        self,
        folder: str | Path,
        table: RoutingTable,
        tokenizer: Any,
        *,
        every: int,
        examples: int,
        max_bytes: int = 2**26,
        probe: Callable[..., list[dict[str, Any]]] | None = None,
        writes: bool = True,
    ) -> None:
        self.dropped = 0
        self._path = Path(folder) / TRACE_FILE
        self._table, self._tokenizer = table, tokenizer
        self._every, self._examples, self._max_bytes = every, examples, max_bytes
        self._probe, self._writes = probe, writes
        self._pending: dict[int, Completion] = {}
        self._records: dict[int, dict[str, Any]] = {}
        self._thresholds: dict[str, float] | None = None

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

            own(self._path.parent, [TRACE_FILE])
            tell_torn(self._path, mend_lines(self._path, keep))

    def begin(
        self,
        step: int,
        rows: Sequence[Mapping[str, Any]],
        scores: Sequence[float] | None,
        batch: dict[str, Tensor],
        metrics: Mapping[str, float],
    ) -> None:
        """Choose what to trace of a scored batch, and mark it in the batch for `observe`.

        Args:
            step (`int`): optimizer steps made so far.
            rows (`list[dict]`): dataset rows, one for each completion.
            scores (`list[float]`, *optional*): the verifier's.
            batch (`dict[str, Tensor]`): the batch after scoring; it gains `trace_row`.
            metrics (`dict[str, float]`): of the batch; the thresholds are among them in a routed table.
        """
        count = min(self._examples, len(rows)) if self._writes else 0
        self._records, self._pending = {}, {}
        seen: dict[str, int] = {}
        for number in range(count):
            key = row_key(rows[number])
            score = None if scores is None else scores[number]
            rollout = seen.get(key, 0)
            self._pending[number] = Completion(rows[number], step, number, rollout, "batch", score)
            seen[key] = rollout + 1
        self._thresholds = thresholds_of(metrics)
        if self._writes and self._probe is not None:
            made = self._probe(thresholds=self._thresholds, step=step, first_number=count)
            self._records = {record["row"]: record for record in made}
        marks = torch.full((len(rows),), -1, dtype=torch.long)
        marks[:count] = torch.arange(count)
        batch[TRACED] = marks.to(batch["completion_ids"].device)

    def observe(
        self,
        inputs: Mapping[str, Tensor],
        student: tuple[Tensor, Head],
        targets: Mapping[str, tuple[Tensor, Head]],
        routed: RoutedLoss,
    ) -> None:
        """Keep what the loss of a micro-batch says of the traced completions in it.

        Args:
            inputs (`dict[str, Tensor]`): the micro-batch; without `trace_row`, nothing is traced.
            student (`tuple[Tensor, Head]`): hidden states (B, T, H) and head of the plain student.
            targets (`dict[str, tuple[Tensor, Head]]`): the same of the sources.
            routed (`RoutedLoss`): the loss of the micro-batch.
        """
        if TRACED not in inputs:
            return
        # Every rank takes part in this: a sharded head is collected by all.
        models = {name: (hidden, head.gathered(hidden.dtype)) for name, (hidden, head) in targets.items()}
        models[""] = (student[0], student[1].gathered(student[0].dtype))
        for place, number in enumerate(inputs[TRACED].tolist()):
            if number < 0 or number not in self._pending:
                continue
            kept = inputs["completion_mask"][place].bool()
            ids = inputs["completion_ids"][place][kept]
            details = {
                name: token_details(hidden[place][kept][:MAX_TOKENS], head, ids[:MAX_TOKENS])
                for name, (hidden, head) in models.items()
            }
            teacher = inputs.get("logprobs/privileged_teacher", inputs.get("logprobs/teacher"))
            columns = {
                "gap": inputs.get("gap"),
                "logprob_teacher": teacher,
                "logprob_student": inputs.get("logprobs/privileged_student"),
            }
            self._records[number] = trace_record(
                self._pending[number],
                self._table,
                self._tokenizer,
                ids=ids.tolist(),
                student=details.pop(""),
                targets=details,
                columns={name: None if c is None else c[place][kept].tolist() for name, c in columns.items()},
                regimes=inputs["regimes"][place][kept].tolist() if self._table.routed else None,
                losses=routed.per_token[place][kept].detach().tolist(),
                thresholds=self._thresholds,
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


def thresholds_of(metrics: Mapping[str, float]) -> dict[str, float] | None:
    """The averages that routed a batch, from its metrics; `None` in an unrouted table."""
    if "threshold/gap" not in metrics:
        return None
    return {"gap": metrics["threshold/gap"], "confidence": metrics["threshold/confidence"]}


def tell_torn(path: Path, count: int) -> None:
    """Say that lines of a file were not whole, and are left out."""
    if count:
        logger.warning(f"{path}: {count} line(s) that were cut off, or are no records, are left out")
