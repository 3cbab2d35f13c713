"""Rows whose hints are looked at, written or checked: of a task, or as `datasets` reads them, under our names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from dopd.data.column_names import Columns, likeliest_column
from dopd.data.images import PRIVILEGED_COLUMN
from dopd.errors import ConfigError, DataError
from dopd.hints.answers import answer_text, read_answer
from dopd.hints.audit import Audit, audit_rows
from dopd.runs.rows import Origin, check_each, located_in, mapped_rows
from dopd.step.verifier import Verifier, tried
from dopd.tasks import get_source, rows_of_task
from dopd.trainer.images import undecoded
from dopd.verifiers.named import load_verifier

TASK_PREFIX = "task:"
_LOOKED_AT = 100  # rows


@dataclass(frozen=True)
class HintData:
    """Where rows come from.

    Attributes:
        name (`str`): `task:NAME`, or a dataset as `dataset_name` of a configuration.
        config, split (`str`, *optional*): of a dataset.
        columns (`dict[str, str or list[str]]`): its names by ours.
        kind (`str`, *optional*): `privileged_kind` of a task.
        count (`int`, *optional*): most rows, from the first on; of a task 256 if not given.
        task_options (`dict`): difficulty knobs of a task.
    """

    name: str
    config: str | None = None
    split: str | None = None
    columns: Columns = field(default_factory=dict)
    kind: str | None = None
    count: int | None = None
    task_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> Origin:
        return Origin("DATA", "--split", self.name, self.config, self.split)

    @property
    def task(self) -> str | None:
        """The name of a task whose rows these are."""
        return self.name.removeprefix(TASK_PREFIX) if self.name.startswith(TASK_PREFIX) else None


def rows_of(data: HintData, *, needs: Sequence[str] = ("prompt", "privileged_context")) -> Dataset:
    """Rows under our names.

    Args:
        data (`HintData`): where they are.
        needs: columns without which there is nothing to do.

    Raises:
        ConfigError, DataError: no such task, or rows that cannot be read; the message names what to write.
    """
    if data.task is not None:
        source = get_source(data.task, **data.task_options)
        kind = source.default_kind if data.kind is None else data.kind
        return Dataset.from_list(rows_of_task(source, data.split or "train", data.count or 256, kind))
    if data.task_options:
        raise ConfigError(
            f"--task-options (={dict(data.task_options)!r}) is of a task, and {data.name!r} is none: task:NAME"
        )
    rows = undecoded(mapped_rows(data.origin, data.columns))
    for name in needs:
        if name in rows.column_names or (name == "privileged_context" and PRIVILEGED_COLUMN in rows.column_names):
            continue
        theirs = likeliest_column(rows.column_names, name)
        raise DataError(
            f"{data.origin} has no column {name!r}; it has {', '.join(rows.column_names)}. Say which it is: --columns "
            f"'{{{name}: {theirs or 'NAME'}}}'"
        )
    rows = rows.select(range(min(data.count or len(rows), len(rows))))
    if "prompt" in needs:
        check_each(rows, data.origin)
    return rows


def audit(data: HintData, *, kind: str = "steps", max_words: int = 300) -> tuple[Audit, Dataset]:
    """The audit of the hints of some rows, and the rows.

    Args:
        data (`HintData`): where they are.
        kind, max_words: as in `dopd.hints.audit.audit_rows`.

    Raises:
        ConfigError, DataError: as `rows_of`; a hint that is no text.
    """
    rows = rows_of(data)
    try:
        return audit_rows(list_of(rows), kind=kind, max_words=max_words), rows
    except DataError as error:
        raise (error if data.task is not None else located_in(error, data.origin)) from error


def verifier_of(
    data: HintData, name: str | None, rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
) -> Verifier:
    """The verifier of that name, or that of the task; `math` for answers that math-verify reads, otherwise `exact`.

    Raises:
        ConfigError: there is no such verifier.
        ScoringError: it does not score an answer to the first row.
    """
    found = load_verifier(name, options=options)
    if found is None and data.task is not None:
        found = get_source(data.task, **data.task_options).verify
    if found is None:
        answers = [read_answer(text) for row in rows[:_LOOKED_AT] if (text := answer_text(row)) is not None]
        of_numbers = sum(bool(one.values or one.formula) for one in answers) > len(answers) / 2
        found = load_verifier("math" if of_numbers else "exact")
    assert found is not None
    return tried(found, None, [rows])


def list_of(rows: Dataset) -> list[dict[str, Any]]:
    """The rows as mappings, in order."""
    return [dict(row) for row in rows]
