"""The data set that comes with the package: problems of a task whose models come with it, too."""

import json
from pathlib import Path

import pytest

from dopd.errors import ConfigError
from dopd.examples import example_file
from dopd.tasks import get_source


@pytest.mark.parametrize(("name", "split", "count"), [("dag.jsonl", "train", 64), ("dag-test.jsonl", "test", 128)])
def test_its_rows_are_problems_of_the_task_with_their_plans(name: str, split: str, count: int) -> None:
    path = Path(example_file(name))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == count and path.stat().st_size < 32_000
    task = get_source("dag", num_needed=3, num_variables=5)
    made = task.rows(split, count, "hints_without_execution")
    for row, own in zip(rows, made, strict=True):
        assert row["prompt"] == own["prompt"][0]["content"]
        assert [row[key] for key in ("solution", "answer", "privileged_context")] == [
            own[key] for key in ("solution", "answer", "privileged_context")
        ]
        # A plan names what the worked solution works out, in its order; a solution ends in the answer.
        assert row["privileged_context"] == " ".join(["plan", *(w for w in row["solution"].split() if w.isupper())])
        assert row["solution"].split()[-1] == row["answer"]


def test_an_unknown_name_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"'dags.jsonl' must be one of dag-test.jsonl, dag.jsonl. Did you mean 'dag.jsonl'"
    ):
        example_file("dags.jsonl")
