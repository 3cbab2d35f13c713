"""Traces: some completions of a run, token by token, as JSON lines that reports read.

One line is one completion: `step`, `row` (its place in the optimizer batch of the main process), `method`, `prompt`,
`privileged_context`, `score` (the verifier's, or null) and `tokens`, a list with one entry for each token: `text`,
`regime` (a name, or null), `gap` (nats), `logprob_teacher`, `logprob_student` (privileged views, nats), each null
where the method does not read it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dopd.rules import RoutingTable

TRACE_FILE = "trace.jsonl"


class TraceWriter:
    """Writes the first completions of an optimizer batch, every so many steps, and of the last step."""

    def __init__(self, folder: str | Path, table: RoutingTable, tokenizer: Any, *, every: int, examples: int) -> None:
        self._path = Path(folder) / TRACE_FILE
        self._table = table
        self._tokenizer = tokenizer
        self._every = every
        self._examples = examples

    def wants(self, step: int, last_step: int) -> bool:
        """Whether the batch of the step that is about to be made (counted from 0) is traced."""
        return step % self._every == 0 or step == last_step - 1

    def start(self, step: int) -> None:
        """Begin a run at `step`: keep only what earlier steps wrote."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_trace(self._path) if record["step"] < step]
        self._path.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def write(
        self, step: int, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor], scores: Sequence[float] | None
    ) -> None:
        """Append the first completions of a scored batch.

        Args:
            step (`int`): optimizer steps made so far.
            rows (`list[dict]`): dataset rows, one for each completion.
            batch (`dict[str, Tensor]`): the batch after scoring.
            scores (`list[float]`, *optional*): the verifier's.
        """
        with self._path.open("a") as file:
            for row in range(min(self._examples, len(rows))):
                record = {
                    "step": step,
                    "row": row,
                    "method": self._table.name,
                    "prompt": _text(rows[row]["prompt"]),
                    "privileged_context": rows[row].get("privileged_context"),
                    "score": None if scores is None else scores[row],
                    "tokens": self._tokens(batch, row),
                }
                file.write(json.dumps(record) + "\n")

    def _tokens(self, batch: Mapping[str, Tensor], row: int) -> list[dict[str, Any]]:
        ids, mask = batch["completion_ids"][row].tolist(), batch["completion_mask"][row].tolist()
        labels = {number: rule.label for number, rule in self._table.labelled_rows()}
        columns = {
            "gap": batch.get("gap"),
            "logprob_teacher": batch.get("logprobs/privileged_teacher"),
            "logprob_student": batch.get("logprobs/privileged_student"),
        }
        values = {name: None if tensor is None else tensor[row].tolist() for name, tensor in columns.items()}
        regimes = batch["regimes"][row].tolist() if "regimes" in batch else None
        return [
            {
                "text": self._tokenizer.decode([token]),
                "regime": None if regimes is None else labels[regimes[n]],
                **{name: None if column is None else round(column[n], 6) for name, column in values.items()},
            }
            for n, (token, kept) in enumerate(zip(ids, mask, strict=True))
            if kept
        ]


def read_trace(path: str | Path) -> list[dict[str, Any]]:
    """The records of a trace file, in order; none if it does not exist."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    contents = [message["content"] for message in prompt]
    return "\n".join(
        content if isinstance(content, str) else " ".join(block.get("text", "") for block in content)
        for content in contents
    )
