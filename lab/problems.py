"""The problems that students are judged on: the same for every run, and others for tuning."""

import functools
from collections.abc import Mapping
from typing import Any

from dopd.errors import ConfigError
from dopd.tasks import get_task
from lab.families import get_family

TEST_PROBLEMS = 512  # the most that a test takes; validation keeps clear of all of them
_FAR = 1_000_000


@functools.cache
def evaluation_rows(family: str, split: str, count: int, privileged_kind: str) -> list[Mapping[str, Any]]:
    """Rows of a family's problems.

    Args:
        family (`str`): a key of `FAMILIES`.
        split (`str`): `"test"` or `"ood"`, or `"validation"`: held-out problems that equal none of the test's, whatever
            the names and the order of facts.
        count (`int`): how many, at most `TEST_PROBLEMS`.
        privileged_kind (`str`): what p is.

    Raises:
        ConfigError: `count` is too large, or a name is unknown.
    """
    if count > TEST_PROBLEMS:
        raise ConfigError(f"problems (={count}) must be at most {TEST_PROBLEMS}: validation keeps clear of so many")
    problems = get_family(family)
    task: Any = get_task(problems.task, **problems.options)
    if split != "validation":
        return task.rows(split, count, privileged_kind)
    tested = {task.canonical(row) for row in task.rows("test", TEST_PROBLEMS, privileged_kind)}
    found: list[Mapping[str, Any]] = []
    index = _FAR
    while len(found) < count:
        row = task.row("test", index, privileged_kind)
        if task.canonical(row) not in tested:
            found.append(row)
        index += 1
    return found
