"""What a model is judged on: problems of a task, or held-out rows, and the verifier of its answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from dopd.errors import ConfigError, DataError
from dopd.runs.checks import check_rows
from dopd.runs.circumstances import Circumstances
from dopd.runs.rows import Origin, check_each, held_out_rows, located_in
from dopd.step import PromptEncoder
from dopd.step.verifier import Verifier, tried
from dopd.tasks import get_source, rows_of_task
from dopd.trainer.images import undecoded
from dopd.verifiers.named import load_verifier


@dataclass(frozen=True)
class JudgedProblems:
    """Rows and what scores answers to them.

    Attributes:
        rows (`Dataset` or `list[dict]`): the rows.
        verifier (`Verifier`): it has scored one answer.
        origin (`Origin`, *optional*): where rows come from that no task has made.
    """

    rows: Sequence[Any]
    verifier: Verifier
    origin: Origin | None = None

    def check(self, prompts: PromptEncoder, model: Any) -> None:
        """Raise `DataError`, with file and line, for a row of a dataset that the model cannot be asked."""
        if self.origin is None:
            return
        try:
            check_rows(prompts, self.rows, model)
        except DataError as error:
            raise located_in(error, self.origin) from error


def problems_of(asked: Circumstances, split: str | None, count: int, seconds: float | None) -> JudgedProblems:
    """The problems that `dopd.runs.circumstances.check_problems` has allowed.

    Args:
        asked (`Circumstances`): what is asked.
        split (`str`, *optional*): of a task; `"test"` if not given.
        count (`int`): most problems, or rows from the first on.
        seconds (`float`, *optional*): that the verifier may take for an answer.

    Raises:
        ConfigError: a task's split for rows.
        DataError: rows that cannot be read.
        ScoringError: the verifier gives no score.
    """
    verifier = load_verifier(asked.verifier, seconds, asked.verifier_options)
    if asked.task is not None:
        source = get_source(asked.task, **asked.task_options)
        generated = rows_of_task(source, split or "test", count, asked.privileged_kind)
        return JudgedProblems(generated, tried(verifier or source.verify, seconds, [generated]))
    if split is not None:
        raise ConfigError(f"split (={split!r}) is of tasks: rows of a dataset are chosen by dataset_test_split")
    assert asked.dataset_name is not None and verifier is not None
    origin = Origin(
        "dataset_name", "dataset_test_split", asked.dataset_name, asked.dataset_config, asked.dataset_test_split
    )
    rows: Dataset = undecoded(held_out_rows(origin, asked.columns))
    rows = rows.select(range(min(count, len(rows))))
    check_each(rows, origin)
    return JudgedProblems(rows, tried(verifier, seconds, [rows]), origin)
